"""`adapt-pruner eval`: perplexity, reading speed and task scores, of one model or of several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapt_pruner.cli.options import Device, Json, Precision, TrustRemoteCode

if TYPE_CHECKING:
    from adapt_pruner.evaluate.tasks import TaskScore

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folder, .gguf file, hub id or packaged model; one or more.")
    ],
    text: Annotated[
        str | None, typer.Option(help="Text to measure perplexity on: file, folder, glob, hub:NAME, python-docs:heldout.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; windows do not overlap. [default: 512]")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Most windows to read. [default: the whole text]", min=1)] = None,
    chat: Annotated[
        int | None,
        typer.Option(help="Prompts of ours to ask chat models, at most 100; a rule checks each answer.", min=1, max=100),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Tasks to score, separated by commas: commonsense, mmlu, or names that lm-eval knows."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples shown before each item. [default: as the task says]", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most items to score in each task. [default: all]", min=1)] = None,
    task_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of lm-eval YAML files with your own tasks, or with other data for known tasks. Needs --trust-remote-code."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps task scores, so that no task is scored twice.", show_default="~/.cache/adapt-pruner/tasks"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Dense model to compare with. The table then shows the share of its accuracy that the others keep.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
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
    from adapt_pruner.errors import UsageError
    from adapt_pruner.recipe import check_precision

    check_precision(dtype)
    how = Measures(
        text=text, window=window, max_windows=max_windows, chat=chat, tasks=tasks, num_fewshot=num_fewshot, limit=limit, task_dir=task_dir,
        cache_dir=cache_dir, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    how.check()
    if tasks is None and against is not None:
        raise UsageError("--against applies only to tasks; name them with --tasks")
    from adapt_pruner.compare.models import measured
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    if against is not None:
        models = [against, *(name for name in models if name != against)]
    with screen() as listen:
        rows, scores = measured(models, how, listen=listen)
    if against is not None:
        _add_retention(rows, scores)
    if as_json:
        print(to_json(rows[0] if len(models) == 1 else {"models": rows}))
        return
    if text is not None:
        _print(rows)
    if chat is not None:
        if text is not None:
            print()
        _print_chat(rows)
    if scores:
        if text is not None or chat is not None:
            print()
        _print_tasks(rows, scores, limit=limit, against=against is not None)
    if text is not None or scores:
        _print_starts(rows, what="windows" if scores == [] else "texts")


def _add_retention(rows: list[dict[str, Any]], scores: "Sequence[Sequence[TaskScore]]") -> None:
    """Add to each model's scores, in place, the share of the first model's accuracy that it keeps."""
    from adapt_pruner.evaluate.tasks import retention

    for row, scored in zip(rows, scores, strict=True):
        for plain, score, dense in zip(row["tasks"], scored, scores[0], strict=True):
            plain["retention"], plain["retention_above_chance"] = retention(score, dense)


def _print(rows: list[dict[str, Any]]) -> None:
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events.words import counted
    from adapt_pruner.core.model.weight_mask import has_zeros

    zeros = any(has_zeros(row["params"], row["nonzero"]) for row in rows)
    print_table(
        ["model", "parameters", *(["not zero"] if zeros else []), "on disk", "perplexity", "bits/byte", "tokens/s"],
        [
            [
                row["model"],
                f"{row['params']:,}",
                *([f"{row['nonzero']:,}"] if zeros else []),
                f"{row['weight_bytes'] / 1e6:,.0f} MB",
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )
    first = rows[0]
    for row in rows:
        if row["dequantised"]:
            print(
                f"\n{row['model']} is dequantised from {row['dequantised']}, so it differs a little from the model that its "
                "makers published"
            )
    print(
        f"\nperplexity over {first['tokens']:,} tokens in {counted(first['windows'], 'window')}; weights on disk as safetensors"
    )


def _print_chat(rows: list[dict[str, Any]]) -> None:
    """How each model answers our prompts; from the second model on also how many of the first one's right answers it gives."""
    from adapt_pruner.cli.tables import print_table

    asked = max((row["chat"]["asked"] for row in rows if row["chat"]), default=0)
    first = rows[0]["chat"]
    lines = []
    for row in rows:
        chat = row["chat"]
        if chat is None:
            lines.append([row["model"], "no chat template", "", "", ""])
            continue
        both = f"{len(set(chat['right']) & set(first['right']))} of {len(first['right'])}" if first and row is not rows[0] else ""
        lines.append([row["model"], f"{len(chat['right'])}", both, f"{chat['ended']}", f"{chat['looping']}"])
    print_table(["model", f"right of {asked}", "of the first model's", "end", "loop"], lines)
    print("\nright by a rule for each prompt (a word, a number of things); the likeliest token each time, at most 64 an answer")


def _print_tasks(
    rows: list[dict[str, Any]], scores: "Sequence[Sequence[TaskScore]]", *, limit: int | None, against: bool
) -> None:
    """Tasks by models, in per cent with standard errors; with `against` the others are compared with the first model."""
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events import words

    header, names = ["task", "metric", "items"], [row["model"] for row in rows]
    for name in names:
        header += [name, "kept", "above chance"] if against and name != names[0] else [name]
    lines = []
    for index, dense in enumerate(scores[0]):
        line = [dense.task, dense.metric, f"{dense.items:,}"]
        for row, scored in zip(rows, scores, strict=True):
            score = scored[index]
            line.append(words.score(score.value, score.stderr, share=score.accuracy))
            if against and scored is not scores[0]:
                line += [_share(row["tasks"][index][key]) for key in ("retention", "retention_above_chance")]
        lines.append(line)
    means = [row["average"] for row in rows]
    if means[0] is not None:
        line = ["average", "", ""]
        for mean in means:
            line.append(words.score(mean["value"], mean["stderr"], share=True))
            if against and mean is not means[0]:
                line += [_share(mean["value"] / means[0]["value"]) if means[0]["value"] > 0 else "", ""]
        lines.append(line)
    print_table(header, lines, left=2)
    print(
        f"\naccuracies in per cent ± standard error; {words.shots(score.shots for score in scores[0])}"
        + (f"; the first {limit:,} items of each task" if limit is not None else "")
        + f"; data: {', '.join(dict.fromkeys(score.data for score in scores[0]))}"
    )
    if against:
        print(
            f"kept: share of the accuracy of {names[0]} that is left; above chance: the same share of what lies above guessing, "
            "where the dense model is clearly above it"
        )
    again = sum(score.again for scored in scores for score in scored)
    if again:
        print(f"{again} of {len(scores) * len(scores[0])} scores come from earlier calls")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _print_starts(rows: list[dict[str, Any]], *, what: str) -> None:
    """Print which models read their windows or texts after a start token."""
    starts: dict[str, list[str]] = {}
    for row in rows:
        if row["windows_start_with"] is not None:
            starts.setdefault(row["windows_start_with"], []).append(row["model"])
    for token, names in starts.items():
        print(f"{what}{'' if len(names) == len(rows) else ' of ' + ', '.join(names)} start with {token}")
