"""A plain folder for the stock class, with every layer zero-padded to the widest; it loads everywhere but saves nothing."""

from pathlib import Path

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import check_target, save
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.export.padding import (
    LayerSizes,
    accepted,
    check_layers,
    layer_sizes,
    still_fitting,
    stock_model,
    widest,
)
from adapt_pruner.export.plain import holds, opened
from adapt_pruner.export.plain import loading_padded as loading

__all__ = ["ABOUT", "holds", "loading", "opened", "write"]

ABOUT = "a plain folder of the stock class: every layer zero-padded to the widest, which costs its memory and time again"


def write(loaded: Loaded, path: Path, *, quant: str | None = None) -> list[str]:
    """Write `loaded` as a plain Hugging Face folder, with each layer zero-padded to the widest; logits stay the same.

    Raises:
        UsageError: the folder is not empty, the model is sliced, or no stock class has a place for its biases.
        RunError: the folder could not be written.
    """
    check_target(path)
    check_layers(loaded.model.config, "a stock class")
    least = widest(layer_sizes(loaded.model))
    grown = [
        LayerSizes(kv_heads, query_heads, least.neurons)
        for kv_heads in range(least.kv_heads, 4 * least.kv_heads + 1)
        for query_heads in range(least.query_heads, 4 * least.query_heads + 1)
    ]
    stock = stock_model(
        loaded.model,
        min(grown, key=lambda size: (not accepted(loaded.model, size), size.heads, size.kv_heads)),
        instead="the form gguf or onnx",
    )
    mask, notes = still_fitting(loaded.weight_mask, stock.state_dict())
    save(stock, loaded.tokenizer, path, dtype=loaded.dtype, weight_mask=mask)
    before, after = count_parameters(loaded.model), count_parameters(stock)
    if after == before:
        return notes
    return [
        *notes,
        f"padding brings {before:,} parameters to {after:,}; what was pruned is zero, and costs its memory and time again",
    ]
