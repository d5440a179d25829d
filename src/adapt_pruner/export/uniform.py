"""A plain folder for the stock class, for a model whose layers are all of one size: no code of ours and no padding."""

from pathlib import Path

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import check_target, save
from adapt_pruner.core.model.kinds import LABELS, USUAL
from adapt_pruner.errors import UsageError, settings
from adapt_pruner.export.padding import check_layers, layer_sizes, stock_model
from adapt_pruner.export.plain import holds, loading, opened

__all__ = ["ABOUT", "holds", "loading", "opened", "write"]

ABOUT = "a plain folder of the stock class"


def write(loaded: Loaded, path: Path, *, quant: str | None = None) -> list[str]:
    """Write `loaded` as a plain Hugging Face folder with nothing but the model.

    Raises:
        UsageError: layers differ in size, or one of the reasons of `padded.write` applies.
        RunError: the folder could not be written.
    """
    check_target(path)
    check_layers(loaded.model.config, "a stock class")
    sizes = layer_sizes(loaded.model)
    for kind in (*USUAL, "query_heads"):
        of_layers = [getattr(size, kind) for size in sizes]
        if min(of_layers) != max(of_layers):
            raise UsageError(
                f"layers have between {min(of_layers):,} and {max(of_layers):,} {LABELS[kind]}, and a stock class has one number for all; "
                f"prune with {settings({'equal_widths': True})}, or use the form padded or onnx"
            )
    stock = stock_model(loaded.model, sizes[0], instead="the form padded or gguf")
    save(stock, loaded.tokenizer, path, dtype=loaded.dtype, weight_mask=loaded.weight_mask)
    return []
