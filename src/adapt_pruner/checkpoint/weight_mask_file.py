"""The file of a mask over weights, in a folder beside the model: `sparsity/weight_mask.safetensors`.

NAME       a linear layer's mask as bits, uint8 (see `core.model.weight_mask.packed`)
metadata   `format`, `pattern` ("2:4", "50%", or "" if a cut has broken it) and `shapes`, JSON: NAME -> [outputs, inputs]

It has a folder of its own because vLLM and SGLang read every `*.safetensors` file beside config.json as weights.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapt_pruner.checkpoint.untrusted import found
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import WeightMask, packed, unpacked
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import of_json, to_json
from adapt_pruner.errors import RunError, UsageError, first_line


def write_weight_mask(mask: WeightMask, folder: Path) -> None:
    """Write a mask into a model folder under construction."""
    path = folder / filenames.WEIGHT_MASK
    path.parent.mkdir()
    shapes = {name: list(keep.shape) for name, keep in mask.kept.items()}
    about = {"format": "1", "pattern": "" if mask.pattern is None else str(mask.pattern), "shapes": to_json(shapes)}
    save_file({name: packed(keep) for name, keep in mask.kept.items()}, path, metadata=about)


def read_weight_mask(folder: str, name: str, model: Any) -> WeightMask | None:
    """The mask beside a model; None if it has none.

    Args:
        folder: the model's folder, or its id on the hub.
        name: the model's name for messages.
        model: the model.

    Raises:
        RunError: the file is damaged, or belongs to another model.
    """
    path = found(folder, filenames.WEIGHT_MASK)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != "1":
                raise ValueError(f"format {about.get('format')!r} is not known to this version; known: 1")
            shapes = of_json(about["shapes"])
            for layer, shape in shapes.items():
                if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
                    raise ValueError(f"{layer} has the shape {shape}; a shape is [outputs, inputs], each 1 or more")
            kept = {layer: unpacked(file.get_tensor(layer), shape) for layer, shape in shapes.items()}
        mask = WeightMask(kept, Pattern.parse(about["pattern"]) if about["pattern"] else None)
    except (SafetensorError, UsageError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{filenames.WEIGHT_MASK} of {name} is damaged ({first_line(error)}); remove it to load the model as one whose zeros are ordinary weights"
        ) from error
    try:
        mask.check(model)
    except ValueError as error:
        raise RunError(
            f"sparsity/ of {name} belongs to another model: {error}; remove it to load the model without its mask"
        ) from error
    return mask
