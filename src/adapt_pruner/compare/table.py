"""The results of the cells: one row per method and size, medians over its draws; as plain data, as words, as Markdown."""

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapt_pruner.core.events.words import counted, shown
from adapt_pruner.core.system.strict_json import perplexity_of
from adapt_pruner.report.comparison import failures, label, num_draws, texts_in_words, tokens_note

_NOTE = 72  # the most characters of a reason in the table; compare.md has it in full


def rows_of(
    cells: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    *,
    bytes_a_token: Mapping[str, float] | None = None,
    in_domain: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the table: the dense model first, then by size (large first), by sparsity, and by perplexity on the first text.

    Perplexity is exp(loss) for each draw by itself; then medians are taken. Parameters are those of the largest model of a row.

    Args:
        cells: the figures of each cell, or its `error`, with `method` and `size`.
        dense: `params`, `decoder_params` and `nll` of the model that all were made from.
        in_domain: method -> the texts that look of the same kind as its calibration text.
        bytes_a_token: SPEC of a text -> mean bytes of text per predicted token of the dense model.

    Returns:
        Plain data: `method`, `size` (None for dense), `sparsity` (None except for methods that make zeros), `params`, `nonzero`,
        `decoder_params`, `removed` (share of the decoder), `texts` (SPEC -> `perplexity`, `low`, `high`, `ratio` and, with
        `bytes_a_token`, `bits_per_byte`), `vocab_size`, `in_domain` (texts of the same kind as its calibration text), `seconds`,
        `peak_bytes`, `speed_up`, `answers` (with `evaluation.chat`: how many of the dense model's right answers it gives, `right` `of`),
        `draws` (number of draws with figures), `failed` (number without), and `error` (the first reason
        or None). A figure that no draw has is None or empty.
    """
    groups: dict[tuple[int, str, str | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["size"], cell["method"], cell.get("sparsity")), []).append(cell)
    each = bytes_a_token or {}
    rows = [_row(method, size, draws, dense, each, sparsity=sparsity) for (size, method, sparsity), draws in groups.items()]
    first = next(iter(dense["nll"]))
    patterns = list(dict.fromkeys(row["sparsity"] for row in rows))
    worst = {first: {"perplexity": math.inf}}  # of a row without figures, which comes behind one that overflows
    rows.sort(
        key=lambda row: (
            -row["size"], patterns.index(row["sparsity"]), (row["texts"] or worst)[first]["perplexity"], not row["texts"]
        )
    )  # fmt: skip
    first_row = _row("dense", None, [{**dense, "speed_up": 1.0}], dense, each)
    return [row | {"in_domain": list((in_domain or {}).get(row["method"], ()))} for row in (first_row, *rows)]


def _row(
    method: str,
    size: int | None,
    cells: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    bytes_a_token: Mapping[str, float],
    *,
    sparsity: str | None = None,
) -> dict[str, Any]:
    done = [cell for cell in cells if "error" not in cell]
    failed = [cell["error"] for cell in cells if "error" in cell]
    texts = {}
    for text in dense["nll"] if done else ():
        perplexities = [perplexity_of(cell["nll"][text]) for cell in done]
        middle = statistics.median(perplexities)
        ratio = middle / perplexity_of(dense["nll"][text])
        texts[text] = {"perplexity": middle, "low": min(perplexities), "high": max(perplexities), "ratio": ratio}
        if text in bytes_a_token:
            nats = statistics.median(cell["nll"][text] for cell in done)
            texts[text]["bits_per_byte"] = nats / math.log(2) / bytes_a_token[text]

    def of(key: str, how: Callable[[list[float]], float]) -> Any:
        values = [cell[key] for cell in done if cell.get(key) is not None]
        return how(values) if values else None

    decoder = of("decoder_params", max)
    return {
        "method": method, "size": size, "sparsity": sparsity, "params": of("params", max), "nonzero": of("nonzero", max),
        "decoder_params": decoder,
        "removed": None if decoder is None else 1 - decoder / dense["decoder_params"], "texts": texts,
        "vocab_size": of("vocab_size", max), "seconds": of("seconds", statistics.median), "peak_bytes": of("peak_bytes", max),
        "speed_up": of("speed_up", statistics.median), "answers": _answers(done), "draws": len(done), "failed": len(failed),
        "error": failed[0] if failed else None,
    }  # fmt: skip


def _answers(cells: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """How many of the dense model's right answers to our prompts a method's models give, the median; None if none was asked."""
    chats = [cell["chat"] for cell in cells if cell.get("chat")]
    if not chats:
        return None
    both = [len(set(chat["right"]) & set(chat["dense"])) for chat in chats]
    return {"right": statistics.median(both), "of": len(chats[0]["dense"])}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as words. A line before each size names it; if anything failed, a last column says what."""
    texts = list(rows[0]["texts"])
    spread = any(row["draws"] > 1 for row in rows)
    notes = any(row["error"] for row in rows)
    zeros = any(row.get("sparsity") for row in rows)
    header = ["method", "parameters", "not zero" if zeros else "removed"]
    for text in texts:
        header.append("perplexity" if len(texts) == 1 else f"perplexity, {label(text, texts)}")
        header += [
            *(["spread"] if spread else []),
            "× dense",
            *(["bits/byte"] if "bits_per_byte" in rows[0]["texts"][text] else []),
        ]
    with_answers = any(row.get("answers") for row in rows)
    header += [*(["right answers"] if with_answers else []), "seconds", "peak memory", "speed-up", *(["failed"] if notes else [])]
    lines, size = [], (None, None)
    for row in rows:
        if (row["size"], row.get("sparsity")) != size:
            size = row["size"], row.get("sparsity")
            heading = f"{size[1]} zeros" if size[1] else f"at most {shown(size[0], 'params')}"
            lines += [[""] * len(header), [heading, *[""] * (len(header) - 1)]]
        lines.append(_words(row, texts, dense=rows[0], spread=spread, notes=notes, zeros=zeros, with_answers=with_answers))
    return header, lines


def _words(
    row: Mapping[str, Any],
    texts: Sequence[str],
    *,
    dense: Mapping[str, Any],
    spread: bool,
    notes: bool,
    zeros: bool,
    with_answers: bool,
) -> list[str]:
    name, same = str(row["method"]), row.get("in_domain") or []
    if same:  # figures on text like its calibration text
        name += f" (in-domain{'' if len(same) == len(texts) else ': ' + ', '.join(label(text, texts) for text in same)})"
    removed = _or_dash(row["nonzero"], "{:,}") if zeros else _or_dash(row["removed"], "{:.1%}")
    words = [name, _or_dash(row["params"], "{:,}"), removed]
    for text in texts:
        figures, before = row["texts"].get(text), dense["texts"][text]
        words.append(_perplexity(figures["perplexity"]) if figures else "–")
        if spread:
            words.append(f"{_perplexity(figures['low'])}–{_perplexity(figures['high'])}" if figures and row["draws"] > 1 else "–")
        compares = figures and math.isfinite(before["perplexity"] or math.inf)
        words.append(_times(figures["ratio"]) if compares else "–")
        if "bits_per_byte" in before:
            words.append(f"{figures['bits_per_byte']:.4f}" if figures else "–")
    if with_answers:
        answers = row.get("answers")
        words.append(f"{answers['right']:g} of {answers['of']}" if answers else "–")
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
    words += [_or_dash(row["seconds"], "{:,.1f}"), _or_dash(peak, "{:.1f} GiB"), _or_dash(row["speed_up"], "{:.2f}×")]
    if notes:
        some = f"{row['failed']} of {row['failed'] + row['draws']} draws: " if row["draws"] and row["failed"] else ""
        words.append(textwrap.shorten(some + (row["error"] or "").partition(";")[0], _NOTE, placeholder=" …"))
    return words


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _perplexity(value: float | None) -> str:
    """A perplexity in words; compare.json has null if it overflows a float."""
    return shown(math.inf if value is None else value, "perplexity")


def _times(ratio: float | None) -> str:
    """A perplexity divided by the dense model's, in words."""
    if ratio is None or not math.isfinite(ratio):
        return "∞"
    return f"{ratio:,.2f}" if ratio < 10**7 else f"{ratio:.1e}"


def markdown(result: Mapping[str, Any], *, picture: bool) -> str:
    """The comparison as a page: what was measured and how, the table, the picture, and every reason in full."""
    request = result["arguments"]
    count = num_draws(request)
    drawn = f"{counted(count, 'draw')} of calibration text"
    if request["calibration_ids"] or request["calibration"]:
        drawn += f" ({'files of token ids' if request['calibration_ids'] else request['calibration']})"
    if count > 1:
        drawn += "; medians over them, the spread from lowest to highest"
    changed = f" Changed in every recipe: {', '.join(request['overrides'])}." if request["overrides"] else ""
    note = tokens_note(result)
    page = [
        f"# {request['model']}: {', '.join(request['methods'])}\n",
        f"Perplexity on {texts_in_words(result)}; windows of {request['window']}, {result['precision']}, {result['device']}. {drawn}.{changed} Parameters "
        "are counted in the saved models, the largest of a row. Seconds and peak memory are those of the pruning process, the median "
        "and the largest; the speed-up is that of reading a window." + (f" {note}" if note else "") + "\n",
        f"Made by {result['made_by']}.\n",
    ]
    for rows in (result["rows"], result.get("sparse_rows") or []):
        if len(rows) > 1 or rows is result["rows"]:
            header, lines = table(rows)
            page += [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
            page += [*(f"| {' | '.join(line)} |" for line in lines if any(line)), ""]
    page.pop()
    if picture:
        page += ["", "![Perplexity against parameters](compare.svg)"]
    failed = [f"* {line}" for line in failures(result)]
    return "\n".join([*page, *(["", "What failed:", "", *failed] if failed else [])]) + "\n"
