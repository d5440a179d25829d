"""What the results of the ladder say: a table of claims judged by paired differences, curves, and tokens saved."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jobs import Job

from adapt_pruner.core.events.words import compact
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system.files import write_whole
from adapt_pruner.report.charts import Lines, Series
from adapt_pruner.report.paper import write_pictures
from adapt_pruner.report.template import environment

Result = Mapping[str, Any]
Key = tuple[str, str, float]  # rung, arm, tokens a parameter

LEVEL = 0.005
"""Nats: arms whose 95 % interval lies within this distance of 0 are level."""
_ALPHA = 0.05


@dataclass(frozen=True)
class Judged:
    """What the runs say of a claim: the loss of the arm that should be worse, less that of the better, in nats; above 0 for the claim.

    Attributes:
        differences: of several bases one each, the mean over its seeds; of one base one for each seed.
        bases: number of bases.
        pairs: of runs on one base with one seed.
        mean: of the differences.
        half: half the width of their 95 % interval (Student's t); infinite for one.
        p: of the hypothesis that the mean is 0, corrected for all tests on the rung (Holm); 1 for one difference.
    """

    differences: tuple[float, ...]
    bases: int
    pairs: int
    mean: float
    half: float
    p: float

    @classmethod
    def of(cls, by_base: Sequence[Sequence[float]]) -> "Judged":
        """Judged alone, from the differences of the pairs on each base."""
        differences = tuple(by_base[0] if len(by_base) == 1 else map(mean, by_base))
        middle, number = mean(differences), len(differences)
        half, p = math.inf, 1.0
        if number > 1:
            error = stdev(differences) / math.sqrt(number)
            half = _t_of(_ALPHA, number - 1) * error
            p = p_of(middle / error, number - 1) if error else float(middle == 0)
        return cls(differences, len(by_base), sum(map(len, by_base)), middle, half, p)

    @property
    def verdict(self) -> str:
        """True or false if p is below 0.05; else level if the interval lies within 0.005 nats of 0, or else undecided."""
        if self.p < _ALPHA:
            return "true" if self.mean > 0 else "false"
        return "level" if abs(self.mean) + self.half <= LEVEL else "undecided"


def p_of(t: float, degrees: int) -> float:
    """The chance that Student's t of so many degrees of freedom is as far from 0, by its finite series."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for number in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    inside = 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
    return 1 - inside


def _t_of(p: float, degrees: int) -> float:
    """The t of which `p_of` is p, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if p_of(middle, degrees) > p else (low, middle)
    return high


def holm(values: Sequence[float]) -> list[float]:
    """p-values of tests that are made together, corrected by Holm's method, in their order."""
    corrected, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = min(1.0, max(highest, values[index] * (len(values) - place)))
        corrected[index] = highest
    return corrected


def _by_key(results: Sequence[Result]) -> dict[Key, dict[tuple[int, int], Result]]:
    """Results of the main jobs by rung, arm and tokens, then by base and seed; those of failed jobs and of sweeps are left out."""
    by_key: dict[Key, dict[tuple[int, int], Result]] = defaultdict(dict)
    for result in results:
        if "error" not in result and not result.get("swept"):
            by_key[result["rung"], result["arm"], result["at"]][result["base"], result["seed"]] = result
    return by_key


def judged(results: Sequence[Result], table: Mapping[str, Any]) -> dict[tuple[str, str, float], Judged]:
    """(claim, rung, tokens a parameter) -> what the runs say of it; nothing where there is no pair. Tests of a rung are corrected together."""
    by_key = _by_key(results)
    found: dict[tuple[str, str, float], Judged] = {}
    for claim in table["claims"]:
        for rung, arm, at in sorted(by_key, key=str):
            if arm not in claim["better"] or bool(claim.get("untrained")) != (at == 0):
                continue
            for than in claim["than"]:
                better, worse = by_key[rung, arm, at], by_key.get((rung, than, at), {})
                by_base: dict[int, list[float]] = defaultdict(list)
                for base, seed in sorted(better.keys() & worse.keys()):
                    by_base[base].append(worse[base, seed]["loss"] - better[base, seed]["loss"])
                if by_base:
                    found[claim["says"], rung, at] = Judged.of(list(by_base.values()))
    for rung in {rung for _, rung, _ in found}:
        tests = [key for key, alone in found.items() if key[1] == rung and len(alone.differences) > 1]
        for key, p in zip(tests, holm([found[key].p for key in tests]), strict=True):
            found[key] = replace(found[key], p=p)
    return found


def tables(results: Sequence[Result], table: Mapping[str, Any]) -> dict[str, list[str]]:
    """Markdown tables: claims, arms, and tokens saved against training from scratch."""
    by_key = _by_key(results)
    claims = [
        "| claim | rung | tokens a parameter | bases | pairs | difference, nats | 95 % interval | p (Holm) | verdict |",
        "|---|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for (says, rung, at), found in sorted(
        judged(results, table).items(), key=lambda item: (_place(table, item[0][0]), item[0][1:])
    ):
        interval = f"{found.mean - found.half:+.4f} to {found.mean + found.half:+.4f}" if math.isfinite(found.half) else "–"
        claims.append(
            f"| {says} | {rung} | {at:g} | {found.bases} | {found.pairs} | {found.mean:+.4f} | {interval} | {found.p:.2g} | {found.verdict} |"
        )
    arms = [
        "| rung | arm | tokens a parameter | runs | parameters | loss, nats | spread | bits a byte | CPU-s |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for (rung, arm, at), runs in sorted(by_key.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])):
        losses = [run["loss"] for run in runs.values()]
        spread = f"{min(losses):.4f}–{max(losses):.4f}" if len(losses) > 1 else "–"
        first = next(iter(runs.values()))
        arms.append(
            f"| {rung} | {arm}, {table['arms'][arm]['says']} | {at:g} | {len(runs)} | {first['params']:,} | {mean(losses):.4f} | {spread} "
            f"| {mean(run['bits_per_byte'] for run in runs.values()):.4f} | {mean(run['cpu_seconds'] for run in runs.values()):.0f} |"
        )
    failed = [
        f"* {result['rung']}, base {result['base']}, {result['arm']} at {result['at']:g}, seed {result['seed']}, failed: {result['error']}"
        for result in results if "error" in result
    ]  # fmt: skip
    return {"claims": claims, "arms": arms, "work": _equal_work(by_key, table), "saved": _saved(by_key, table), "failed": failed}


def _place(table: Mapping[str, Any], says: str) -> int:
    return next(number for number, claim in enumerate(table["claims"]) if claim["says"] == says)


def _equal_work(by_key: Mapping[Key, Mapping[tuple[int, int], Result]], table: Mapping[str, Any]) -> list[str]:
    """Arms beside one cut at as much work, parameters times tokens: one cut's loss is read off its curve on the same base and seed."""
    lines = [
        "| rung | arm | tokens a parameter | work, of one cut's | bases | behind one cut at equal tokens, nats | at equal work | 95 % interval |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for (rung, arm, at), runs in sorted(by_key.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])):
        cuts = {tokens: cut for (its, other, tokens), cut in by_key.items() if (its, other) == (rung, "b") and tokens}
        more, equal_tokens, equal_work = [], [], defaultdict(list)
        for pair, run in runs.items():
            curve = sorted(
                (cut[pair]["parameter_tokens"], cut[pair]["loss"])
                for cut in cuts.values()
                if "parameter_tokens" in cut.get(pair, {})
            )
            if arm == "b" or pair not in cuts.get(at, {}) or not run.get("parameter_tokens"):
                continue
            one_cut = _loss_at(run["parameter_tokens"], curve)
            if one_cut is not None:
                more.append(run["parameter_tokens"] / cuts[at][pair]["parameter_tokens"])
                equal_tokens.append(run["loss"] - cuts[at][pair]["loss"])
                equal_work[pair[0]].append(run["loss"] - one_cut)
        if more:
            found = Judged.of(list(equal_work.values()))
            interval = f"{found.mean - found.half:+.4f} to {found.mean + found.half:+.4f}" if math.isfinite(found.half) else "–"
            lines.append(
                f"| {rung} | {arm}, {table['arms'][arm]['says']} | {at:g} | {mean(more):.2f} | {found.bases} | {mean(equal_tokens):+.4f} "
                f"| {found.mean:+.4f} | {interval} |"
            )
    return lines if len(lines) > 2 else []


def _loss_at(work: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The loss of a curve at so much work, linear in log work between its points; None outside."""
    for (left, above), (right, below) in pairwise(curve):
        if left <= work <= right:
            return above + (below - above) * math.log(work / left) / math.log(right / left)
    return None


def _saved(by_key: Mapping[Key, Mapping[tuple[int, int], Result]], table: Mapping[str, Any]) -> list[str]:
    """How many times more tokens training from scratch takes to the loss of one cut; with and without what the base has read."""
    lines = [
        "| rung | tokens a parameter | loss of one cut | tokens from scratch / tokens after the cut | … with those of the base |",
        "|---|---:|---:|---:|---:|",
    ]
    for rung in sorted({key[0] for key in by_key}):
        scratch = sorted(
            (next(iter(runs.values()))["tokens"], mean(run["loss"] for run in runs.values()))
            for (its, arm, at), runs in by_key.items() if (its, arm) == (rung, "a") and at
        )  # fmt: skip
        for (its, arm, at), runs in sorted(by_key.items()):
            if (its, arm) != (rung, "b") or not at or len(scratch) < 2:
                continue
            loss, tokens = mean(run["loss"] for run in runs.values()), next(iter(runs.values()))["tokens"]
            base = parse_count(table["rungs"][rung]["base_tokens"])
            needed, sign = _tokens_to(loss, scratch)
            lines.append(f"| {rung} | {at:g} | {loss:.4f} | {sign}{needed / tokens:.1f} | {sign}{needed / (tokens + base):.2g} |")
    return lines if len(lines) > 2 else []


def _tokens_to(loss: float, curve: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """The tokens at which a falling curve reaches a loss, linear in log tokens between its points; `> ` where it does not get there."""
    for (left, above), (right, below) in pairwise(curve):
        if below <= loss <= above:
            share = (above - loss) / (above - below)
            return math.exp(math.log(left) + share * (math.log(right) - math.log(left))), ""
    return (curve[-1][0], "> ") if loss < curve[-1][1] else (curve[0][0], "< ")


def pictures(results: Sequence[Result], table: Mapping[str, Any]) -> list[Lines]:
    """Of each rung: loss against tokens, and the paired difference of each arm to one cut."""
    by_key, charts = _by_key(results), []
    for rung in dict.fromkeys(key[0] for key in by_key):
        losses, differences = [], []
        for arm in table["arms"]:
            runs = {at: by_key[its, a, at] for its, a, at in sorted(by_key, key=str) if (its, a) == (rung, arm) and at}
            runs = dict(sorted(runs.items()))
            if runs:
                losses.append(
                    _series(table["arms"][arm]["says"], {at: [run["loss"] for run in of.values()] for at, of in runs.items()})
                )
            paired = {
                at: [run["loss"] - cut[pair]["loss"] for pair, run in of.items() if pair in cut]
                for at, of in runs.items() if arm not in ("a", "b") and (cut := by_key.get((rung, "b", at), {}))
            }  # fmt: skip
            if any(paired.values()):
                differences.append(_series(table["arms"][arm]["says"], {at: values for at, values in paired.items() if values}))
        about = "Bars run from the lowest to the highest run."
        if sum(len(series.points) for series in losses) > 1:
            charts.append(
                Lines(
                    f"ladder-{rung}",
                    f"Held-out loss against training tokens, rung {rung}",
                    about,
                    losses,
                    "tokens a parameter",
                    "nats a token",
                    y_form="loss",
                    log=False,
                )
            )
        if sum(len(series.points) for series in differences) > 1:
            charts.append(
                Lines(
                    f"ladder-{rung}-paired",
                    f"Paired difference to one cut, rung {rung}",
                    "Above 0: one cut is better. " + about,
                    differences,
                    "tokens a parameter",
                    "nats above one cut",
                    y_form="plain",
                )
            )
    return charts


def _series(name: str, by_tokens: Mapping[float, Sequence[float]]) -> Series:
    several = all(len(values) > 1 for values in by_tokens.values())
    points = [(at, mean(values)) for at, values in by_tokens.items()]
    low, high = ([pick(values) for values in by_tokens.values()] if several else [] for pick in (min, max))
    return Series(name, points, low, high, dots=True)


def write_report(results: Sequence[Result], table: Mapping[str, Any], folder: Path, *, plan: str, jobs: Sequence[Job]) -> str:
    """Write ladder.md, ladder.html and the pictures; returns a sentence that says where.

    Args:
        results: of this plan and of others.
        table: ladder.yaml.
        folder: where.
        plan: the plan's name.
        jobs: its jobs.
    """
    made, charts = tables(results, table), pictures(results, table)
    done = len({Job.of(one) for one in results if "error" not in one}.intersection(jobs))
    cpu = sum(result.get("cpu_seconds", 0.0) for result in results)
    head = f"{done} of {len(jobs)} jobs of the plan `{plan}` are done, in {cpu / 3600:.2f} CPU-hours without the bases."
    text = "\n\n".join([head, *("\n".join(lines) for lines in made.values() if lines)]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "ladder.md", text)
    template = environment().from_string(Path(__file__).with_name("ladder.html").read_text(encoding="utf-8"))
    page = template.render(plan=plan, written=head, charts=charts, tables=list(made.values()))
    write_whole(folder / "ladder.html", page)
    write_pictures(charts, folder, endings=("svg",))
    return f"{head} {compact(sum(result.get('tokens', 0) for result in results))} training tokens. The report is {folder / 'ladder.md'}"
