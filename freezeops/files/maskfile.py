"""Files of masks: versioned, keyed by variable path, checked before anything changes.

A `checkedfile` whose header has `polarity`, `bit_order` and `masks`, a list of `path`, `shape` and `layout`; behind it
the packed bits of each mask, in that order, without gaps.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from freezeops.files import mask_sources
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.registry.methods import masked_optimizer
from freezeops.storage import checkedfile
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import BIT_ORDER, POLARITY, StoredMask, take_mask

_KIND = checkedfile.Kind(b"freezeops masks\n", 1, "mask file", "save_masks")


def save_masks(optimizer: Any, path: str | os.PathLike) -> None:
    """Writes the masks of an optimizer's variables to a file.

    A crash leaves the old file or the new one, never a part of one.

    Args:
        optimizer: A built `MaskedOptimizer`, or the `LossScaleOptimizer` that Keras put around it.
        path: The file; an existing one is replaced, with its mode kept; of a symbolic link its target is.

    Raises:
        ValueError: If the optimizer is not built, two of its variables have one path, or `path` is that of a folder,
            a device or the like.
    """
    masks = masked_optimizer(optimizer).masks_by_path()
    header = {
        "polarity": POLARITY,
        "bit_order": BIT_ORDER,
        "masks": [
            {"path": name, "shape": list(mask.shape), "layout": list(mask.layout)} for name, mask in masks.items()
        ],
    }
    checkedfile.write(Path(path), _KIND, header, b"".join(mask.packed.tobytes() for mask in masks.values()))


def load_masks(
    optimizer: Any,
    path: str | os.PathLike,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Registers the masks of a file; variables that it does not name keep theirs.

    Masks find their variables by path, whatever the order of the variables is; where no variable has exactly that path,
    by what Keras's counting means (`dense_3/kernel` for `dense/kernel`).

    Args:
        optimizer: A `MaskedOptimizer`, built or not, or the `LossScaleOptimizer` that Keras put around it.
        path: A file that `save_masks` wrote; or a `.keras`, `.weights.h5`, sharded `.weights.json` or `.h5` file, or a
            `tf.train.Checkpoint` of a model with a `MaskedOptimizer`, of which the masks alone are read.
        rename: Optional mapping from paths in the file to paths of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered or none of ours; if `rename`
            names a path that is not in it; or if a path or shape does not fit the
            optimizer's variables. Nothing has changed then.

    Example:

    ```python
    model = keras_hub.models.TextClassifier.from_preset("./saved")  # comes back with an optimizer of its own
    model.compile(fz.MaskedOptimizer(keras.optimizers.AdamW(1e-4)), loss)
    fz.load_masks(model.optimizer, "./saved/task.weights.h5")
    ```
    """
    optimizer, path = masked_optimizer(optimizer), Path(path)
    layouts: dict[str, Layout] = {}
    of_masks = not mask_sources.is_source(path)
    if not of_masks:
        stored, layouts = mask_sources.read(path)
    else:
        stored = Stored([StoredMask(name, mask.shape, mask) for name, mask in _read(path).items()])
    names = [mask.name for mask in stored.masks]
    rename = dict(rename or {})
    if unknown := sorted(set(rename) - set(names)):
        raise ValueError(
            f"`rename` must map paths that are in the file. Received: {short(unknown)}, for a file with "
            f"{short(sorted(names))}"
        )
    if len({rename.get(name, name) for name in names}) != len(names):
        raise ValueError(f"`rename` must give every mask a path of its own. Received: rename={short(rename)}")
    stored.masks = [replace(mask, name=rename.get(mask.name, mask.name)) for mask in stored.masks]
    stored.variables = [(rename.get(name, name), shape) for name, shape in stored.variables]
    layouts = {rename.get(name, name): layout for name, layout in layouts.items()}
    optimizer._registry.register_stored(stored, layouts, strict=of_masks)


def _read(path: Path) -> dict[str, Mask]:
    """The masks of a file by path, or an error that says what is wrong with it."""
    header, content = checkedfile.read(path, _KIND)
    if header.get("polarity") != POLARITY or header.get("bit_order") != BIT_ORDER:
        what = f"its polarity is {short(header.get('polarity'))}, its bit order {short(header.get('bit_order'))}"
        raise checkedfile.refusal(path, _KIND, what)
    try:
        return _parse(header, content)
    except ValueError as error:
        raise checkedfile.refusal(path, _KIND, f"its header does not describe masks: {error}") from None


def _parse(header: dict[str, Any], content: bytes) -> dict[str, Mask]:
    """The masks that a header describes, by path.

    Raises:
        ValueError: If it describes none, or others than the bytes behind it.
    """
    masks: dict[str, Mask] = {}
    offset = 0
    for entry in checkedfile.field(header, "masks", list):
        path = checkedfile.field(entry, "path", str)
        if path in masks:
            raise ValueError(f"every mask must have a path of its own. Received: {short(path)} twice")
        masks[path], offset = take_mask(entry, content, offset)
    if offset != len(content):
        raise ValueError(f"there must be {offset} bytes of masks. Received: {len(content)} bytes")
    return masks
