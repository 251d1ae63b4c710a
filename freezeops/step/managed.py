"""The record of one variable: its partition, its slots, and who stated its mask."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from freezeops.backward.skipping import NOT_TRACED, Outcome
from freezeops.keras_compat.variables import numpy_of
from freezeops.keras_compat.wrapped import SlotRecord
from freezeops.masks.mask import Mask
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.compact_values import gather_values, scatter_values
from freezeops.partitions.partition import MaskedPartition, Partition
from freezeops.slots.unfreezing import VariableSlots
from freezeops.step.fused import FusedUpdates, NotFused

Source = Literal["call", "load"]
"""Who stated a mask last: a call of the user's, or a file."""


@dataclass
class ManagedVariable:
    """The record of one variable.

    Attributes:
        partition: How it is split between frozen and trainable entries; it alone holds the mask bits.
        slots: Its slots of known role; `None` where none can be unfrozen, or nothing is known of slots.
        slot_records: The slots that the inner optimizer made for it.
        fused: What updates it in one pass, or the reason that nothing does.
        stated: Who stated its mask last; `None`: nobody.
        awaiting: Whether a config left its mask out, and nobody has stated it since.
        gradient: How its gradient was made in the step that was made or traced last.
    """

    partition: Partition
    slots: VariableSlots | None = None
    slot_records: list[SlotRecord] = field(default_factory=list)
    fused: FusedUpdates | NotFused = field(default_factory=lambda: NotFused(""))
    stated: Source | None = None
    awaiting: bool = False
    gradient: Outcome = NOT_TRACED

    def prepare(self, mask: Mask) -> None:
        """Brings the slots into line with a mask that is set next."""
        if self.slots is not None and isinstance(self.partition, MaskedPartition):
            self.slots.change(self.partition.mask, mask, self.partition.layout)

    def forget_changes(self) -> None:
        """Called when mask and slots come from elsewhere: earlier changes no longer count."""
        if self.slots is not None:
            self.slots.forget()

    @property
    def waiting(self) -> Mask | None:
        """The entries that wait to be seeded; `None`: none."""
        slots, partition = self.slots, self.partition
        if slots is None or slots.unseeded is None:
            return None
        flags = slots.waiting().reshape(-1)
        if isinstance(partition, CompactPartition):
            flags = scatter_values(flags, partition.mask.indices(), np.zeros(partition.size, bool))
        return Mask.from_array(flags.reshape(tuple(partition.variable.shape))) if flags.any() else None

    @waiting.setter
    def waiting(self, waiting: Mask | None) -> None:
        slots, partition = self.slots, self.partition
        if slots is None or slots.unseeded is None:
            return
        flags = np.zeros(partition.size, bool)
        if waiting is not None:
            flags = (waiting & partition.mask).to_numpy().reshape(-1)
        entries = partition.mask.indices() if isinstance(partition, CompactPartition) else None
        slots.set_waiting(gather_values(flags, entries, tuple(slots.variable.shape)))

    def state_values(self) -> list[tuple[Any, np.ndarray]]:
        """Returns the variables of the slots, each with its values now."""
        kept = [record.slot for record in self.slot_records]
        if self.slots is not None:
            kept += [state for _, state in self.slots.resettable if not any(state is each for each in kept)]
            kept += [self.slots.unseeded] if self.slots.unseeded is not None else []
        return [(variable, numpy_of(variable)) for variable in kept]
