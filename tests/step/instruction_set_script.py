"""FusedUpdate against its twin on one instruction set. Usage: FREEZEOPS_ISA=SET python instruction_set_script.py SET"""

import sys

import numpy as np
from fused_variables import DTYPES, RULES, assert_same_state, variables_of, with_compact_gradient

from freezeops import ops
from freezeops.masks.layout import Layout
from freezeops.ops import native, reference_updates

STATES = ("full", "compact", "compact gradients")
LAYOUTS = [Layout(1, 5003, 1), Layout(1, 77, 9)]

if __name__ == "__main__":
    assert native.diagnosis().isa == sys.argv[1]
    for state in STATES:
        for rule in RULES:
            for dtype in DTYPES:
                for density in (0.01, 0.5, 1.0):
                    rng, seeded = np.random.default_rng(1), RULES[rule][0]
                    *both, told = variables_of(rng, rule, dtype, LAYOUTS, density, state != "full", seeded)
                    if state == "compact gradients":
                        both = [[with_compact_gradient(one) for one in each] for each in both]
                    ours, twins = both
                    ops.fused_update(rule, ours, *told)
                    reference_updates.fused_update(rule, twins, *told)
                    assert_same_state(ours, twins, f"{rule} {dtype} {density}")
    print("done")
