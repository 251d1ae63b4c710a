"""freezeops freezes individual entries inside a tensor while the rest of it trains.

Polarity, everywhere: True = trainable, False = frozen.
"""

from freezeops._version import __version__ as __version__
from freezeops.files.delta import apply_delta as apply_delta
from freezeops.files.delta import export_delta as export_delta
from freezeops.files.maskfile import load_masks as load_masks
from freezeops.files.maskfile import save_masks as save_masks
from freezeops.masks.mask import Mask as Mask
from freezeops.ops import native
from freezeops.optimizer import MaskedOptimizer as MaskedOptimizer
from freezeops.slots.catalogue import Slot as Slot
from freezeops.slots.catalogue import declare_elementwise as declare_elementwise
from freezeops.slots.catalogue import declare_slots as declare_slots
from freezeops.transforms import mask_gradient as mask_gradient
from freezeops.transforms import mask_gradients as mask_gradients
from freezeops.transforms import partial_stop_gradient as partial_stop_gradient

# `tf.saved_model.load` of a train step asks TensorFlow for its ops by name.
native.register_ops()
