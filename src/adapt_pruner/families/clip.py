"""CLIP: a text tower and a vision tower, whose outputs are projected into one space.

    text.layers.I.neurons, text.layers.I.kv_heads, text.layers              of the text tower; a head is called a KV head, as elsewhere
    vision.layers.I.neurons, vision.layers.I.kv_heads, vision.layers        of the vision tower
    projection                                                              a dimension of the common space

The stream of a tower stays: its norms subtract a mean (see `convention.residual`).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers import CLIPConfig

from adapt_pruner.core.model.axes import Axis, Gate, Slice
from adapt_pruner.core.model.budget import unit_cost
from adapt_pruner.families import convention

MODEL_TYPES = ("clip",)
TASK = "contrastive"


def axes(model: Any) -> tuple[Axis, ...]:
    """The axes of both towers, and that of the common space."""
    names = ("visual_projection", "text_projection")
    slices = tuple(Slice(f"{name}.weight", 0) for name in names)
    projection = Axis(
        "projection",
        model.visual_projection.weight.shape[0],
        unit_cost(model, slices),
        Gate(names[0], kind="outputs", also=names[1:]),
        slices,
        fields=(("projection_dim", 1),),
        attributes=("projection_dim",),
    )
    return (*tower_axes(model, "text"), *tower_axes(model, "vision"), projection)


def tower_axes(model: Any, name: str) -> Iterable[Axis]:
    """The axes of a tower, called by its name."""
    tower = convention.Tower(model, f"{name}_model.encoder.layers", getattr(model.config, f"{name}_config"))
    layers: Any = model.get_submodule(tower.stack)
    inside = [
        axis
        for index, layer in enumerate(layers)
        for axis in (*convention.heads(tower, index, layer), *convention.neurons(tower, index, layer))
    ]
    return [replace(axis, name=f"{name}.{axis.name}", enclosing=()) for axis in (*inside, convention.whole_layers(tower))]


def tiny() -> dict[str, Any]:
    """The config of a tiny random model."""
    return {"clip": CLIPConfig(**tiny_towers(), projection_dim=32)}


def tiny_towers() -> dict[str, Any]:
    """The configs of two tiny towers that differ in everything.

    The last token of a text is 1, since with 2 the stock class takes the token of the greatest number for the last one.
    """
    text = dict(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=24,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=8)
    return {"text_config": text, "vision_config": vision}
