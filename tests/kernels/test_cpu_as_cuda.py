"""The cases of the CUDA kernels that hold for the CPU kernels too, run on these."""

from test_fused_kernels import (
    test_compact_state,
    test_entries_without_a_trainable_bit_are_not_read,
    test_every_rule,
    test_full_state,
    test_many_variables,
    test_the_structure_is_the_kernels,
)
from test_fused_kernels import test_slices as test_fused_slices
from test_kernels import test_compact, test_every_length, test_masking, test_ranks, test_single_bits

__all__ = [
    "test_compact",
    "test_compact_state",
    "test_entries_without_a_trainable_bit_are_not_read",
    "test_every_length",
    "test_every_rule",
    "test_full_state",
    "test_fused_slices",
    "test_many_variables",
    "test_masking",
    "test_ranks",
    "test_single_bits",
    "test_the_structure_is_the_kernels",
]
