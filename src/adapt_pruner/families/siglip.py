"""SigLIP: a text tower and a vision tower, whose outputs lie in one space as they are.

The axes are those of CLIP's towers; see `clip`. The vision tower ends in an attention over all its places, with an MLP of its own. That
stays whole, and the config states its sizes in the same fields as those of the layers, so layers that became smaller state their own.
"""

from dataclasses import replace
from typing import Any

from transformers import SiglipConfig

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.families.clip import tiny_towers, tower_axes

MODEL_TYPES = ("siglip",)
TASK = "contrastive"


def axes(model: Any) -> tuple[Axis, ...]:
    """The axes of both towers."""
    vision = (replace(axis, pins=(*axis.pins, ("own_sizes", True))) for axis in tower_axes(model, "vision"))
    return (*tower_axes(model, "text"), *vision)


def tiny() -> dict[str, Any]:
    """The config of a tiny random model."""
    towers = tiny_towers()
    return {"siglip": SiglipConfig(**towers | {"text_config": towers["text_config"] | {"projection_size": 32}})}
