"""`adapt-pruner eval`: perplexity and reading speed of one model, or of several side by side."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from adapt_pruner.cli.options import Device, Json, Precision, TrustRemoteCode, check_precision

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folder, .gguf file, hub id or packaged name; one or more.")
    ],
    text: Annotated[str, typer.Option(help="Text: file, folder, glob, hub:NAME, python-docs:heldout.")],
    window: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most; the whole text by default.", min=1)] = None,
    device: Device = "auto",
    dtype: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text; several models make a table, with their speeds measured in turn.

    Examples:

        adapt-pruner eval small --text python-docs:heldout

        adapt-pruner eval smollm2-135m-instruct small --text wiki.test.txt --max-windows 40
    """
    check_precision(dtype)
    from adapt_pruner.checkpoint.load import load, pick_device
    from adapt_pruner.cli.screen import quiet_libraries, screen
    from adapt_pruner.core.budget import count_parameters
    from adapt_pruner.core.plain import to_json
    from adapt_pruner.data.feeds import held_out_windows
    from adapt_pruner.data.sources import SELF, documents
    from adapt_pruner.data.tokens import opening, text_bytes
    from adapt_pruner.evaluate.anatomy import decoder_parameters
    from adapt_pruner.evaluate.perplexity import perplexity
    from adapt_pruner.evaluate.speed import forward_speed

    quiet_libraries()
    if text != SELF:
        documents(text)  # a text that is not there is said before a model is loaded
    rows: list[dict[str, Any]] = []
    held = []
    with screen() as listen:
        for name in models:
            listen({"event": "load", "model": name})
            loaded = load(name, device=pick_device(device), trust_remote_code=trust_remote_code)
            windows = held_out_windows(loaded.tokenizer, source=text, window=window, max_windows=max_windows)

            def told(done: int, of: int) -> None:
                listen({"event": "progress", "phase": "evaluate", "done": done, "of": of})

            num_bytes = text_bytes(loaded.tokenizer, windows)
            measured = perplexity(loaded.model, windows, dtype=dtype, num_bytes=num_bytes, on_window=told)
            rows.append({
                "model": name, **asdict(measured), "params": count_parameters(loaded.model),
                "decoder_params": decoder_parameters(loaded.model), "weight_bytes": loaded.weight_bytes,
                "windows_start_with": loaded.tokenizer.decode(opening(loaded.tokenizer)) or None,
            })  # fmt: skip
            held.append((loaded.model, windows[0]))
    # The same ids for all: other vocabularies would read other text, but every model has these few ids.
    ids = held[0][1].clamp(max=min(model.config.vocab_size for model, _ in held) - 1)
    for row, speed in zip(rows, forward_speed([model for model, _ in held], ids, dtype=dtype), strict=True):
        row["tokens_per_second"] = speed
    if as_json:
        print(to_json(rows[0] if len(models) == 1 else {"models": rows}))
    else:
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from adapt_pruner.cli.tables import print_table

    print_table(
        ["model", "parameters", "on disk", "perplexity", "bits/byte", "tokens/s"],
        [
            [
                row["model"],
                f"{row['params']:,}",
                f"{row['weight_bytes'] / 1e6:,.0f} MB",
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )
    first = rows[0]
    print(f"\nperplexity over {first['tokens']:,} tokens in {first['windows']} windows; weights on disk as safetensors")
    starts: dict[str, list[str]] = {}
    for row in rows:
        if row["windows_start_with"] is not None:
            starts.setdefault(row["windows_start_with"], []).append(row["model"])
    for token, names in starts.items():
        print(f"windows{'' if len(names) == len(rows) else ' of ' + ', '.join(names)} start with {token}")
