"""The state of the inner optimizer: what each slot means, and what becomes of it when a mask changes.

Pickles of `fz.Slot` name this module.
"""

from freezeops.slots.catalogue import Slot as Slot
