"""Slots from files, which may be of full state where there is compact state now, or the other way round."""

import keras
import numpy as np

from freezeops.keras_compat.variables import numpy_of
from freezeops.partitions.compact import CompactPartition, inner_shape
from freezeops.partitions.compact_values import gather_values, scatter_values
from freezeops.partitions.partition import MaskedPartition
from freezeops.storage.stored_mask import StoredMask


def fitted_slot(
    array: np.ndarray, slot: keras.Variable, partition: MaskedPartition, stored: StoredMask | None
) -> np.ndarray | None:
    """Returns a slot from a file in the form that the slot has now.

    Full state becomes compact state by taking the trainable entries, compact state of one layout or room that of
    another, or full state.

    Args:
        array: The slot in the file.
        slot: The slot.
        partition: The partition of its variable, with its mask as it is now.
        stored: The mask in the file; `None`: there is none, and `array` is of full state.

    Returns:
        An array of the slot's shape; `None` where it does not fit. Entries that the file has not stay as they are.
    """
    shape, whole = tuple(slot.shape), tuple(partition.variable.shape)
    compact_now = isinstance(partition, CompactPartition) and shape == tuple(partition.inner_variable.shape)
    compact_then = stored is not None and stored.mask is not None and stored.mode == "compact"
    if stored is not None and not stored.mode:  # a file of an older version does not say
        compact_then = array.shape != whole or (compact_now and array.shape == shape)
    if not compact_then and not compact_now:
        return array if array.shape == shape else None
    same_masks = stored is not None and stored.mask is not None and stored.mask == partition.mask
    if compact_then and compact_now and array.shape == shape and same_masks:
        return array
    entries_now = partition.mask.indices() if compact_now else np.arange(partition.size)
    if compact_then:
        assert stored is not None and stored.mask is not None
        entries_then = stored.mask.indices()
        if array.shape != inner_shape(partition.variable, stored.mask.layout, array.shape[0] if array.ndim else 0):
            return None
        if array.size < entries_then.size:
            return None
        values = scatter_values(numpy_of(slot), entries_now, np.zeros(partition.size, array.dtype))
        values = scatter_values(array, entries_then, values)
    else:
        if array.shape != whole:
            return None
        values = array.reshape(-1)
    return gather_values(values, entries_now if compact_now else None, shape)
