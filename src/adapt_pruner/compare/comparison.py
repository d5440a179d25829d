"""The comparison itself: finished cells are used again, the others are pruned and measured, and everything is written down.

.adapt-pruner     marks the folder as a comparison; a folder that is not empty and lacks this file is refused
compare.json      arguments, versions, rows and cells; rewritten after every cell
compare.md        the table, with every reason for a failure
compare.svg .png  the picture; as PNG if vl-convert is installed
compare.html      everything as one page
cells/            the figures of each finished cell, under a fingerprint of everything that decides them
models/           checkpoints while they are measured, or all of them if they are kept
"""

import functools
import hashlib
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load_shapes, load_that_fits, locate, pick_device
from adapt_pruner.checkpoint.save import check_empty
from adapt_pruner.checkpoint.state import identity
from adapt_pruner.compare.cells import measure, measure_beside, prune_apart, release
from adapt_pruner.compare.request import Cell, Request
from adapt_pruner.compare.table import markdown, rows_of, table
from adapt_pruner.core import events
from adapt_pruner.core.events import Event, Interrupted, Listener, Load, Warned
from adapt_pruner.core.events.comparison import CellBegun, CellDone, Reused
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.system import filenames, world
from adapt_pruner.core.system.files import check_disk_space, check_place, expanded, is_marked, mark, tidy, why, write_whole
from adapt_pruner.core.system.locks import locked
from adapt_pruner.core.system.provenance import made_by, to_install
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.data.overlap import of_kind, overlaps, same_kind, same_tokens
from adapt_pruner.data.sources import COMPARED, SELF, beginning, domains, texts
from adapt_pruner.data.tokens import calibration_ids, digest_of, text_bytes
from adapt_pruner.data.windows import held_out_windows, too_long
from adapt_pruner.errors import RunError, UsageError, first_line, option
from adapt_pruner.evaluate.anatomy import decoder_parameters, expert_parameters
from adapt_pruner.recipe import Recipe
from adapt_pruner.report.comparison import comparison_page, comparison_panels
from adapt_pruner.report.page import write_page
from adapt_pruner.report.paper import has_png, write_pictures
from adapt_pruner.run.start import placed
from adapt_pruner.work import Work

_KIND = "comparison"


def compare(request: Request, out: Path, *, listen: Listener = lambda event: None, keep: bool = False) -> dict[str, Any]:
    """Prune a model by every method at every size, measure all alike, and write table and picture to the folder `out`.

    Finished cells in that folder are not run again; failed ones are.

    Args:
        request: what to compare, as `Request.checked` returns it.
        out: a folder that is empty, missing, or of a comparison.
        listen: called with every event.
        keep: whether the checkpoints stay; they are used again when their cells are measured on another text.

    Returns:
        The content of compare.json: `made_by`, `arguments`, `device`, `precision`, `texts`, `dense`, `rows` (see
        `table.rows_of`), `sparse_rows`, the rows of methods that make zeros, and `cells`.

    Raises:
        UsageError: the request cannot be met as it stands; no cell has been run.
        RunError: the dense model cannot be measured, or something cannot be written.
    """
    world.check_alone("compare", "it times each method in a process of its own")
    check_place(out, inside=True)
    if not is_marked(out, _KIND):
        check_empty(out)
    for text in request.texts:
        if text != SELF:
            next(texts(text), None)  # reports a missing text before a model is loaded
    _check_room(request)
    listen(Load(model=request.model))
    device, trust = pick_device(request.device), request.trust_remote_code
    dense = functools.partial(load_that_fits, request.model, device=device, trust_remote_code=trust)
    work = _prepared(dense(), request, listen)
    release()
    listen(events.Loaded(model=request.model, params=work.params))
    comparison = _Comparison(request, out, work, dense, listen, keep)
    comparison.check_disk_space()
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark(out, _KIND)
        (out / filenames.CELLS).mkdir(exist_ok=True)
        (out / "models").mkdir(exist_ok=True)
        with locked(out / ".lock"):
            for folder, names in ((out, r"compare\..*"), (out / "models", ".*"), (out / filenames.CELLS, ".*")):
                tidy(folder, ours=names)  # removes what a killed process left half-written
            try:
                return comparison.run()
            except KeyboardInterrupt:
                listen(Interrupted(message=f"{comparison.progress}; the same command continues from there"))
                raise
    except OSError as error:
        raise RunError(f"{out} could not be written: {why(error)}; what is finished there is used again") from error


def _check_room(request: Request) -> None:
    """Refuse methods that take more memory than is free here, before the model is read where config.json tells its sizes.

    Raises:
        UsageError: one of them does, or a size is above the model's own.
    """
    if locate(request.model)[1] is not None:
        return
    model = load_shapes(request.model, trust_remote_code=request.trust_remote_code)
    experts = expert_parameters(families.axes(model))
    for cell in request.cells(count_parameters(model), decoder_parameters(model), experts):
        trouble = ""
        with suppress(UsageError):  # a cell that cannot be made says so when its turn comes
            _, trouble = placed(cell.recipe, trust_remote_code=request.trust_remote_code)
        if trouble:
            raise UsageError(f"{cell.method}: {trouble}")


@dataclass(frozen=True)
class _Prepared:
    """The cells of a comparison, and the texts that were read for them.

    `windows` has the evaluation windows by text. `read` has everything besides the recipe that decides a cell's figures.
    `itemsize` is the bytes of a weight on disk, `text_bytes` the bytes of the predicted text. `in_domain` has for each method
    the texts that look of the same kind as its calibration text.
    """

    cells: list[Cell]
    windows: dict[str, list[Tensor]]
    params: int
    read: dict[str, Any]
    calibration: Callable[[Cell], Any]
    itemsize: int
    text_bytes: dict[str, int]
    in_domain: dict[str, list[str]]
    dequantised: str | None = None


def _prepared(loaded: Loaded, request: Request, listen: Listener) -> _Prepared:
    """Prepare the work, and refuse everything that may be refused.

    Raises:
        UsageError: a size is above the model's own, or a text is not there or too short.
    """
    params = count_parameters(loaded.model)
    cells = request.cells(params, decoder_parameters(loaded.model), expert_parameters(families.axes(loaded.model)))
    windows = {
        text: held_out_windows(loaded.tokenizer, source=text, window=request.window, max_windows=request.max_windows)
        for text in request.texts
    }
    rows = {ids: calibration_ids(ids, vocab_size=loaded.model.config.vocab_size) for ids in request.calibration_ids}
    recipes = request.recipes
    readers = sorted(name for name, recipe in recipes.items() if Work.of(loaded.model, recipe).reads_text)
    calibrated = {name: () if request.calibration_ids else tuple(domains(recipes[name].calibration.source)) for name in readers}
    counted = {name: tuple(_counted(recipe)) for name, recipe in recipes.items()}
    specs = {spec: 1.0 for each in calibrated.values() for spec in each if spec != SELF}
    tokens_of = dict.fromkeys(itertools.chain.from_iterable(counted.values()), 1.0)
    digests = {spec: _text_digest(spec) for spec in specs | tokens_of}
    roles = {"calibration": specs, "vocabulary": tokens_of, "evaluation": dict.fromkeys(request.texts, 1.0)}
    pairs = itertools.product(rows.items() if readers else (), windows.items())
    for sentence in (
        *(overlap.sentence for overlap in overlaps({role: each or None for role, each in roles.items()})),
        *(same_tokens(ids, drawn, text, seen) for (ids, drawn), (text, seen) in pairs),
        same_kind(specs, request.texts),
        *too_long(loaded.model.config, {option("window"): request.window}),
    ):
        if sentence:
            listen(Warned(message=sentence))

    def calibration(cell: Cell) -> Any:
        if not counted[cell.method] and cell.method not in readers:
            return None
        if cell.recipe.calibration.ids is not None:
            return hashlib.sha256(expanded(cell.recipe.calibration.ids).read_bytes()).hexdigest()
        read = domains(cell.recipe.calibration.source) if cell.method in readers else ()
        return [digests.get(spec) for spec in (*counted[cell.method], *read)]

    in_domain = {
        name: [text for text in request.texts if of_kind([*calibrated[name], *counted[name]], text)]
        for name in readers if not request.calibration_ids and recipes[name].calibration.ids is None
    }  # fmt: skip
    device = next(loaded.model.parameters()).device
    read = {
        "model": identity(request.model),
        "windows": {text: digest_of(seen) for text, seen in windows.items()},
        "bfloat16": uses_bfloat16(device, request.dtype),
        "device": device.type,
    }
    predicted = {text: text_bytes(loaded.tokenizer, seen) for text, seen in windows.items()}
    return _Prepared(cells, windows, params, read, calibration, loaded.dtype.itemsize, predicted, in_domain, loaded.dequantised)


def _counted(recipe: Recipe) -> Iterable[str]:
    """The texts whose tokens a recipe counts for its vocabulary; none if all tokens stay."""
    vocabulary = recipe.vocabulary
    return () if vocabulary is None or vocabulary.source is None else domains(vocabulary.source)


def _text_digest(spec: str) -> str:
    digest = hashlib.sha256()
    for document in beginning(spec, COMPARED):
        digest.update(document.digest)
    return digest.hexdigest()


def draw(result: Mapping[str, Any], out: Path, *, warn: Callable[[str], None]) -> bool:
    """Write compare.svg and, if vl-convert is installed, compare.png to `out`. Returns whether there was anything to draw."""
    panels = comparison_panels(result)
    if panels is None:
        return False
    if not has_png():
        warn(f"there is no compare.png, since vl-convert is not installed; {to_install('plot')} and run the same command")
    return bool(write_pictures([panels], out, endings=("svg", "png") if has_png() else ("svg",)))


class _Comparison:
    """A comparison in progress, with the results of its cells so far."""

    def __init__(
        self, request: Request, out: Path, work: _Prepared, dense: Callable[[], Loaded], listen: Listener, keep: bool
    ) -> None:
        self._request, self._out, self._work, self._dense, self._listen, self._keep = request, out, work, dense, listen, keep
        self._names = [cell.name(self._read_for(cell)) for cell in work.cells]
        self._done: dict[str, dict[str, Any]] = {}  # name of the cell -> its figures or `error`
        self._dense_figures: dict[str, Any] = {}  # figures of the dense model
        self._warned: set[str] = set()

    def _read_for(self, cell: Cell, *, measured: bool = True) -> dict[str, Any]:
        """What decides the figures of a cell beside its recipe; without `measured`, what decides its checkpoint only."""
        decides = {key: value for key, value in self._work.read.items() if measured or key != "windows"}
        return decides | {"calibration": self._work.calibration(cell)}

    def check_disk_space(self) -> None:
        """Refuse a place without room for the checkpoints that exist at the same time.

        Raises:
            UsageError: there is too little room.
        """
        coming = [cell.size for name, cell in zip(self._names, self._work.cells, strict=True) if self._stored(name) is None]
        if coming:
            numbers = sum(coming) if self._keep else max(coming)
            check_disk_space(self._out, numbers * self._work.itemsize, largest=max(coming) * self._work.itemsize)

    @property
    def progress(self) -> str:
        """How far the comparison is, in words."""
        return f"{sum('error' not in figures for figures in self._done.values())} of {len(self._names)} cells are finished"

    def run(self) -> dict[str, Any]:
        """Run everything that is not finished, then write table and picture."""
        of = len(self._work.cells)
        for name in self._names:
            if (stored := self._stored(name)) is not None:
                self._done[name] = stored
        reused = len(self._done)
        if reused:
            self._listen(Reused(done=reused, of=of))
            self._warn_of_other_versions()
        self._dense_figures = self._measured_dense()
        self._write(self._result())
        for number, (name, cell) in enumerate(zip(self._names, self._work.cells, strict=True), start=1):
            if name in self._done:
                continue
            where: dict[str, Any] = {"cell": number, "of": of, "method": cell.method, "size": cell.size, "draw": cell.draw + 1}
            where |= {"draws": self._request.num_draws, "sparsity": cell.sparsity or None}
            self._listen(CellBegun(**where, **self._foreseen(cell)))
            self._done[name] = self._figures(name, cell)
            first = next(iter(self._work.windows))
            nll = self._done[name].get("nll", {}).get(first)
            self._listen(CellDone(**where, nll=nll, error=self._done[name].get("error")))
            self._write(self._result())
        result = self._result()
        picture = draw(result, self._out, warn=self._warn)
        write_whole(self._out / "compare.md", markdown(result, picture=picture))
        zeros = table(result["sparse_rows"]) if result["sparse_rows"] else None
        write_page(
            self._out / filenames.COMPARISON_PAGE,
            comparison_page(result, *table(result["rows"]), name=self._out.resolve().name, sparse=zeros),
        )
        if not any((self._out / "models").iterdir()):
            (self._out / "models").rmdir()
        return result

    def _figures(self, name: str, cell: Cell) -> dict[str, Any]:
        """Prune and measure one cell, and keep its figures on disk. If it fails, its error takes their place."""
        path = self._out / "models" / cell.name(self._read_for(cell, measured=False))
        began = time.perf_counter()
        try:
            if not path.exists():  # otherwise it was pruned before an interruption, or kept
                prune_apart(cell.recipe, path, listen=self._relay, trust_remote_code=self._request.trust_remote_code)
            figures = measure_beside(
                self._dense(), path, self._work.windows, dtype=self._request.dtype, size=cell.size, listen=self._listen
            )
        except Exception as error:  # one cell's failure does not stop the others
            figures = {"error": str(error) if isinstance(error, UsageError | RunError) else first_line(error)}
        else:
            figures["cell_seconds"] = time.perf_counter() - began
            write_whole(self._out / filenames.CELLS / f"{name}.json", to_json(figures, indent=1) + "\n")
        release()
        if not self._keep or "error" in figures:
            shutil.rmtree(path, ignore_errors=True)
        return figures

    def _stored(self, name: str) -> dict[str, Any] | None:
        try:
            figures: dict[str, Any] = read_json(self._out / filenames.CELLS / f"{name}.json")
        except (OSError, ValueError):
            return None
        return figures

    def _measured_dense(self) -> dict[str, Any]:
        digest = hashlib.sha256(to_json(self._work.read).encode()).hexdigest()
        name = f"dense-{digest[:12]}"
        figures = self._stored(name)
        if figures is None:
            figures = measure(self._dense(), self._work.windows, dtype=self._request.dtype, listen=self._listen)
            write_whole(self._out / filenames.CELLS / f"{name}.json", to_json(figures, indent=1) + "\n")
            release()
        return figures

    def _foreseen(self, cell: Cell) -> dict[str, Any]:
        """Estimated seconds of a cell and of all cells left, by the means of methods or of all; empty if none is finished."""
        took: dict[str, list[float]] = {}
        for name, done in zip(self._names, self._work.cells, strict=True):
            if "cell_seconds" in self._done.get(name, {}):
                took.setdefault(done.method, []).append(self._done[name]["cell_seconds"])
        if not took:
            return {}
        means = {method: statistics.fmean(seconds) for method, seconds in took.items()}
        every = statistics.fmean(means.values())
        left = [other.method for name, other in zip(self._names, self._work.cells, strict=True) if name not in self._done]
        return {"seconds_left": sum(means.get(method, every) for method in left), "seconds_here": means.get(cell.method, every)}

    def _result(self) -> dict[str, Any]:
        work = self._work
        cells = [
            {"method": cell.method, "size": cell.size, "draw": cell.draw}
            | ({"sparsity": cell.sparsity} if cell.sparsity else {})
            | self._done[name]
            for name, cell in zip(self._names, work.cells, strict=True)
            if name in self._done
        ]
        tokens = {text: sum(ids.numel() - 1 for ids in windows) for text, windows in work.windows.items()}
        each = {text: work.text_bytes[text] / tokens[text] for text in tokens}
        rows = functools.partial(rows_of, dense=self._dense_figures, bytes_a_token=each, in_domain=work.in_domain)
        zeros = [cell for cell in cells if "sparsity" in cell]
        return {
            "made_by": made_by(),
            "arguments": asdict(self._request),
            "dequantised": work.dequantised,
            "device": work.read["device"],
            "precision": "bfloat16" if work.read["bfloat16"] else "float32",
            "texts": [
                {
                    "text": text, "windows": len(windows), "tokens": tokens[text], "bytes": work.text_bytes[text],
                    "digest": work.read["windows"][text],
                }
                for text, windows in work.windows.items()
            ],
            "dense": self._dense_figures,
            "rows": rows([cell for cell in cells if "sparsity" not in cell]),
            "sparse_rows": rows(zeros) if zeros else [],
            "cells": cells,
        }  # fmt: skip

    def _write(self, result: Mapping[str, Any]) -> None:
        write_whole(self._out / filenames.COMPARISON, to_json(dict(result), indent=1) + "\n")

    def _relay(self, event: Event) -> None:
        """Pass on what the process of a cell says; a warning already heard from another cell is not repeated."""
        self._warn(event.message) if isinstance(event, Warned) else self._listen(event)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._listen(Warned(message=message))

    def _warn_of_other_versions(self) -> None:
        others = {figures["made_by"] for figures in self._done.values()} - {made_by()}
        if others:
            self._warn(
                f"some finished cells were made by other versions ({'; '.join(sorted(others))}); name another folder to run them again"
            )
