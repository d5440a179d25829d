"""`adapt-pruner eval` and `verify`: how good models are, side by side, and whether an exported artefact computes what its checkpoint computes."""

from collections.abc import Mapping, Sequence
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapt_pruner.api import measuring
from adapt_pruner.cli.options import Json, options_of
from adapt_pruner.cli.tables import print_table
from adapt_pruner.core.events import words
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import RunError, UsageError

if TYPE_CHECKING:
    from adapt_pruner.evaluate.tasks import TaskScore


@options_of(measuring.evaluate, without="model")
def evaluate(
    *,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folder, .gguf file, hub id or packaged model; one or more.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Dense model to compare with. The table then shows the share of its accuracy that the others keep.",
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Measure the perplexity of one or more MODELs on a text, their answers to prompts, or their scores on tasks.

    With --text, the models' reading speeds are measured too, in turn. Tasks need `pip install '.[eval]'` in the clone. A task that
    was scored before is not scored again.

    Examples:

        adapt-pruner eval small --text python-docs:heldout

        adapt-pruner eval smollm2-135m-instruct small --text wiki.test.txt --max-windows 40

        adapt-pruner eval small --tasks commonsense --against smollm2-135m-instruct
    """
    from adapt_pruner.compare.measures import Measures

    how = Measures(**options)
    how.check()
    if how.tasks is None and against is not None:
        raise UsageError("--against applies only to tasks; name them with --tasks")
    from adapt_pruner.compare.models import measured
    from adapt_pruner.evaluate.tasks import retention
    from adapt_pruner.report.screen import screen

    if against is not None:
        models = [against, *(name for name in models if name != against)]
    with screen() as listen:
        rows, scores = measured(models, how, listen=listen)
    if against is not None:
        for row, scored in zip(rows, scores, strict=True):
            for figures, score, dense in zip(row["tasks"], scored, scores[0], strict=True):
                figures["retention"], figures["retention_above_chance"] = retention(score, dense)
    if as_json:
        print(to_json(rows[0] if len(models) == 1 else {"models": rows}))
        return
    if any("judged" in row for row in rows):
        _print_pairs(rows)
    elif how.text is not None:
        _print_text(rows)
    if how.chat is not None:
        print(end="\n" if how.text is not None else "")
        _print_chat(rows)
    if scores:
        print(end="\n" if how.text is not None or how.chat is not None else "")
        _print_tasks(rows, scores, limit=how.limit, against=against is not None)
    if how.text is None and not scores:
        return
    starts: dict[str, list[str]] = {}
    for row in rows:
        if row["windows_start_with"] is not None:
            starts.setdefault(row["windows_start_with"], []).append(row["model"])
    for token, names in starts.items():
        of = "" if len(names) == len(rows) else f" of {', '.join(names)}"
        print(f"{'texts' if scores else 'windows'}{of} start with {token}")


def _print_text(rows: Sequence[Mapping[str, Any]]) -> None:
    from adapt_pruner.core.model.weight_mask import has_zeros

    zeros = ["not zero"] if any(has_zeros(row["params"], row["nonzero"]) for row in rows) else []
    print_table(
        ["model", "parameters", *zeros, "on disk", "perplexity", "bits/byte", "tokens/s"],
        [
            [
                row["model"], f"{row['params']:,}", *(f"{row['nonzero']:,}" for _ in zeros), f"{row['weight_bytes'] / 1e6:,.0f} MB",
                f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}", f"{row['tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        if row["dequantised"]:
            print(
                f"\n{row['model']} is dequantised from {row['dequantised']}, so it differs a little from the model that its "
                "makers published"
            )
    for row in rows:
        if experts := row.get("experts"):
            print(
                f"\nexperts of {row['model']}: {experts['share']:.1%} of {experts['hits'] + experts['misses']:,} were in memory when they were "
                f"needed, the others took {experts['read_bytes'] / 1e9:.2f} GB of reading and {experts['waited']:.1f} s of waiting; at most "
                f"{experts['most_bytes'] / 2**30:.2f} GiB of experts in memory, {experts['peak_bytes'] / 2**30:.1f} GiB of the process"
            )
    seen = f"{rows[0]['tokens']:,} tokens in {words.counted(rows[0]['windows'], 'window')}"
    print(f"\nperplexity over {seen}; weights on disk as safetensors")


def _print_pairs(rows: Sequence[Mapping[str, Any]]) -> None:
    """Retrieval, and classes by their names, of models that read pictures."""
    lines = {
        "parameters": [f"{row['params']:,}" for row in rows],
        "on disk": [f"{row['weight_bytes'] / 1e6:,.0f} MB" for row in rows],
        "loss": [f"{row['nll']:.3f}" for row in rows],
        **{name: [f"{row['judged'][name]:.1%}" for row in rows] for name in rows[0]["judged"]},
    }
    print_table(["", *(row["model"] for row in rows)], [[name, *values] for name, values in lines.items()])
    each = rows[0]["tokens"] // rows[0]["windows"]
    print(f"\nretrieval among {each:,} pairs (--window); {rows[0]['tokens']:,} pairs were read; weights on disk as safetensors")


def _print_chat(rows: Sequence[Mapping[str, Any]]) -> None:
    """How each model answers our prompts; from the second model on also how many of the first one's right answers it gives."""
    num_prompts = max((row["chat"]["asked"] for row in rows if row["chat"]), default=0)
    first = rows[0]["chat"]
    lines = []
    for row in rows:
        chat = row["chat"]
        if chat is None:
            lines.append([row["model"], "no chat template", "", "", ""])
            continue
        both = f"{len(set(chat['right']) & set(first['right']))} of {len(first['right'])}" if first and row is not rows[0] else ""
        lines.append([row["model"], f"{len(chat['right'])}", both, f"{chat['ended']}", f"{chat['looping']}"])
    print_table(["model", f"right of {num_prompts}", "of the first model's", "end", "loop"], lines)
    print("\nright by a rule for each prompt (a word, a number of things); the likeliest token each time, at most 64 an answer")


def _print_tasks(
    rows: Sequence[Mapping[str, Any]], scores: "Sequence[Sequence[TaskScore]]", *, limit: int | None, against: bool
) -> None:
    """Tasks by models, in per cent with standard errors; with `against` the others are compared with the first model."""
    first = scores[0]
    table = [
        ["task", "metric", "items"],
        *([score.task, score.metric, f"{score.items:,}"] for score in first),
        ["average", "", ""],
    ]
    for row, scored in zip(rows, scores, strict=True):
        mean, dense = row["average"] or {"value": 0.0, "stderr": 0.0}, rows[0]["average"]
        column = [row["model"], *(words.score(score.value, score.stderr, share=score.accuracy) for score in scored)]
        columns = [[*column, words.score(mean["value"], mean["stderr"], share=True)]]
        if against and row is not rows[0]:
            kept = mean["value"] / dense["value"] if dense and dense["value"] > 0 else None
            columns.append(["kept", *(_share(figures["retention"]) for figures in row["tasks"]), _share(kept)])
            columns.append(["above chance", *(_share(figures["retention_above_chance"]) for figures in row["tasks"]), ""])
        table = [[*line, *cells] for line, *cells in zip(table, *columns, strict=True)]
    header, *lines = table if rows[0]["average"] is not None else table[:-1]
    print_table(header, lines, left=2)
    some = f"; the first {limit:,} items of each task" if limit is not None else ""
    data = ", ".join(dict.fromkeys(score.data for score in first))
    print(f"\naccuracies in per cent ± standard error; {words.shots(score.shots for score in first)}{some}; data: {data}")
    if against:
        print(
            f"kept: share of the accuracy of {rows[0]['model']} that is left; above chance: the same share of what lies above guessing, "
            "where the dense model is clearly above it"
        )
    again = sum(score.again for scored in scores for score in scored)
    if again:
        print(f"{again} of {len(scores) * len(first)} scores come from earlier calls")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


@options_of(measuring.verify)
def verify(
    *,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The checkpoint that was exported: folder, .gguf file, hub id or packaged model.")
    ],
    artefact: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ARTEFACT]",
            help="What `export` wrote: a .gguf file or a folder. Without it the zeros of a sparse DIR are verified.",
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Check that ARTEFACT, in its own engine, computes what DIR computes in torch.

    The exit status is 1 if a difference exceeds its tolerance, or if a sparse DIR does not have the zeros that its mask over
    weights promises. A .gguf file runs in llama.cpp, a folder with model.onnx in ONNX Runtime. Any other folder runs in stock
    transformers, in a process without adapt-pruner.

    Examples:

        adapt-pruner verify small small.gguf

        adapt-pruner verify small small-plain --text wiki.test.txt --json

        adapt-pruner verify small-2-4
    """
    figures = unwrap(measuring.verify)(model, artefact, progress=True, **options).figures
    zeros = figures.get("sparsity")
    failures = [] if zeros is None else zeros["failures"]
    if as_json:
        print(to_json(figures))
    else:
        if artefact is not None:
            _print_proof(figures)
        if zeros is not None and not failures:
            _print_zeros(model, zeros)
    if failures:
        more = f" (and {len(failures) - 1} more; --json lists all)" if len(failures) > 1 else ""
        raise RunError(f"{model} does not have the zeros that its mask over weights promises: {failures[0]}{more}; make it again")
    if not figures["passed"]:
        raise RunError(
            f"{artefact} does not compute what {model} computes: {'; '.join(figures['failures'])}; export it again, or with more bits if it is quantised"
        )


def _print_zeros(model: str, zeros: Mapping[str, Any]) -> None:
    if zeros["pattern"] is None:
        held = f"these hold the {zeros['masked']:,} that the mask names; it has no pattern, so it promises no others"
    elif ":" in zeros["pattern"]:
        n, m = zeros["pattern"].split(":")
        held = f"in each, every group of {m} inputs has at most {n} weights that are not zero"
    else:
        held = f"each has as many as {zeros['pattern']} asks for, rounded down for each output"
    print(
        f"{model}: {zeros['zeros']:,} of {zeros['weights']:,} weights in {zeros['layers']} linear layers are zero "
        f"({zeros['zeros'] / zeros['weights']:.2%}); {held}"
    )


def _print_proof(figures: Mapping[str, Any]) -> None:
    tolerance, greedy, encoding = figures["tolerance"], figures["greedy"], figures["encoding"]
    deviation, perplexity = figures["deviation"] or 1.0, figures["perplexity"]
    most = "" if tolerance["difference"] is None else f"at most {tolerance['difference']:g}"
    measured = f"{perplexity['artefact']:.3f} ({perplexity['artefact'] / perplexity['model'] - 1:+.2%})"
    rows = [
        ["largest difference of a logit, in standard deviations", f"{figures['max_difference'] / deviation:.2g}", most],
        ["mean difference of a logit, in standard deviations", f"{figures['mean_difference'] / deviation:.2g}", ""],
        ["same token on top", f"{figures['agreement']:.2%}", f"at least {tolerance['agreement']:.0%}"],
        ["perplexity of the model", f"{perplexity['model']:.3f}", ""],
        ["perplexity of the artefact", measured, f"at most {tolerance['perplexity']:.1%} off"],
        ["greedy text, tokens until it differs", f"{greedy['same_tokens']} of {greedy['of']}", ""],
    ]
    if encoding:
        same = f"{encoding['same']} of {encoding['of']}"
        rows.append(["text with the same token ids", same, f"at least {tolerance['encoding']:.0%}"])
    print_table(["", "found", "tolerance"], rows)
    seen = f"{figures['tokens']:,} tokens in {words.counted(figures['windows'], 'window')}"
    print(f"\n{figures['artefact']} ({figures['stored']}) in {figures['engine']}, on {seen}")
    if figures["passed"]:
        print("it computes what the model computes")
