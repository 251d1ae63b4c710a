"""Mask files: masks by variable path, checked before anything changes.

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
        path: The file. An existing one is replaced and its mode kept; of a symbolic link, the target is replaced.

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
    """Registers the masks of a file. Variables that the file does not name keep theirs.

    Masks find their variables by path, whatever the order of the variables is. If no variable has exactly that path,
    the numbers that Keras counts up are left out of account (`dense_3/kernel` for `dense/kernel`).

    Args:
        optimizer: A `MaskedOptimizer`, built or not, or the `LossScaleOptimizer` that Keras put around it.
        path: A file that `save_masks` wrote; or a `.keras`, `.weights.h5`, sharded `.weights.json` or `.h5` file, or a
            `tf.train.Checkpoint`, of a model with a `MaskedOptimizer`. Of these, the masks alone are read.
        rename: Optional mapping from paths in the file to paths of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered or of another kind; if `rename`
            names a path that is not in it; or if a path or shape does not fit the
            optimizer's variables. Nothing has changed then.

    Example:

    Masks of a Keras file for a model that came back without its `MaskedOptimizer`, as those of KerasHub do:

    >>> import os, tempfile
    >>> import keras
    >>> import freezeops as fz
    >>> def new_model():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    ...     model.compile(fz.MaskedOptimizer(keras.optimizers.AdamW(1e-4)), "mse")
    ...     return model
    >>> model = new_model()
    >>> model.optimizer.freeze("head/kernel", [0, 1])
    >>> model.optimizer.build(model.trainable_variables)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
    >>> model.save_weights(path)
    >>> model = new_model()
    >>> fz.load_masks(model.optimizer, path)
    >>> model.optimizer.mask_for(model.get_layer("head").kernel)
    <Mask shape=(4, 2), trainable=4 of 8 (density 0.5), layout=(1, 4, 2), 1 bytes>
    """
    optimizer, path = masked_optimizer(optimizer), Path(path)
    layouts: dict[str, Layout] = {}
    is_mask_file = not mask_sources.is_source(path)
    if is_mask_file:
        stored = Stored([StoredMask(name, mask.shape, mask) for name, mask in _read(path).items()])
    else:
        stored, layouts = mask_sources.read(path)
    stored, layouts = _renamed(stored, layouts, rename or {})
    optimizer._registry.register_stored(stored, layouts, strict=is_mask_file)


def _renamed(
    stored: Stored, layouts: Mapping[str, Layout], rename: Mapping[str, str]
) -> tuple[Stored, dict[str, Layout]]:
    """Returns masks and layouts under other names.

    Raises:
        ValueError: If `rename` names a path that is not there, or two masks would have one name.
    """
    names = [mask.name for mask in stored.masks]
    if unknown := sorted(set(rename) - set(names)):
        raise ValueError(
            f"`rename` must map paths that are in the file. Received: {short(unknown)}, for a file with "
            f"{short(sorted(names))}"
        )
    if len({rename.get(name, name) for name in names}) != len(names):
        raise ValueError(f"`rename` must give every mask a path of its own. Received: rename={short(dict(rename))}")
    masks = [replace(mask, name=rename.get(mask.name, mask.name)) for mask in stored.masks]
    variables = [(rename.get(name, name), shape) for name, shape in stored.variables]
    renamed_layouts = {rename.get(name, name): layout for name, layout in layouts.items()}
    return replace(stored, masks=masks, variables=variables), renamed_layouts


def _read(path: Path) -> dict[str, Mask]:
    """Returns the masks of a mask file, by path. Raises `ValueError` if it is damaged."""
    header, content = checkedfile.read(path, _KIND)
    if header.get("polarity") != POLARITY or header.get("bit_order") != BIT_ORDER:
        problem = f"its polarity is {short(header.get('polarity'))}, its bit order {short(header.get('bit_order'))}"
        raise checkedfile.refusal(path, _KIND, problem)
    try:
        return _parse(header, content)
    except ValueError as error:
        raise checkedfile.refusal(path, _KIND, f"its header does not describe masks: {error}") from None


def _parse(header: dict[str, Any], content: bytes) -> dict[str, Mask]:
    """Returns the masks that a header describes, by path.

    Raises:
        ValueError: If an entry describes no mask, or other bits than there are.
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
