"""The module that pickles of `fz.Mask` name; the class is in `freezeops.masks.mask`."""

from freezeops.masks.mask import Mask as Mask
