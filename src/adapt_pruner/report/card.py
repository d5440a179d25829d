"""The README.md of a checkpoint, a model card for the hub, made of the folder's own JSON and the methods' files.

`card` is a function of config.json and pruning.json. So with one version of this package the same folder gives the same text,
wherever and whenever it is made. The card states what the run recorded, and leaves out what was not measured. Its sentences stand
in templates/card.md; what goes into them is worked out here.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from adapt_pruner.checkpoint.compatible_names import with_common_names
from adapt_pruner.checkpoint.origin import said_of_base
from adapt_pruner.core.events import Listener, Warned
from adapt_pruner.core.events.run import chatted
from adapt_pruner.core.events.words import by_model, counted, millions, score, shots, typed
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import why, write_whole
from adapt_pruner.core.system.strict_json import is_number, read_json
from adapt_pruner.core.system.terminal import visible
from adapt_pruner.data.sources import domains
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.export import form_of
from adapt_pruner.export.loading import layers_of, loading, towers_of
from adapt_pruner.recipe import ALIASES, PAPERS, Recipe, differing, methods, parts, read

_OWN_PAPER = "2502.03460"
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_MAKES_A_METHOD = ("axes", "metric", "distance", "head_metric", "chooser", "repair", "reduce", "solver")  # keys of a recipe
_FLAGS = {
    "calibration.source": "--calibration",
    "calibration.samples": "--calibration-samples",
    "calibration.length": "--calibration-length",
    "calibration.ids": "--calibration-ids",
}  # keys for which `prune` has options


def write_card(folder: Path) -> None:
    """Write the README.md of a checkpoint; an existing one is overwritten.

    Raises:
        UsageError: `folder` is not a checkpoint of ours, or its run has not ended.
        RunError: it could not be written.
    """
    text = card_of(folder)
    try:
        write_whole(folder / filenames.CARD, text)
    except OSError as error:
        raise RunError(f"{folder / 'README.md'} could not be written: {why(error)}") from error


def write_card_of_export(source: Path, out: Path, form: str) -> str | None:
    """Write the README.md of an exported folder: the card of its checkpoint, and how to load the form.

    Args:
        source: the checkpoint. If it is not ours and so has no card, nothing is written.
        out: the folder.
        form: a form that `export` writes as a folder.

    Returns:
        A sentence that says why the export of a checkpoint of ours has no card; None if it has one.

    Raises:
        RunError: the card could not be written.
    """
    if not (source / filenames.PRUNING).is_file():
        return None
    try:
        config = out / filenames.CONFIG
        shape = read_json(config if config.is_file() else source / filenames.CONFIG)  # some forms have no config of their own
        write_whole(out / filenames.CARD, card_of(source, exported=(form, shape)))
    except UsageError as error:
        return f"the export has no model card: {error}"
    except OSError as error:
        raise RunError(f"{out / 'README.md'} could not be written: {why(error)}") from error
    return None


def try_card(folder: Path, *, path: Path, listen: Listener) -> None:
    """Write the card of a result that lies in `folder` and will be called `path`. A failure is only a warning.

    The model is worth more than its card.
    """
    try:
        write_card(folder)
    except Exception as error:
        message = f"the result has no model card: {first_line(error)}; `{typed('card', path)}` tries again"
        listen(Warned(message=message))


def card_of(folder: Path, *, exported: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """The card of a checkpoint, read from its config.json and pruning.json.

    Args:
        folder: the checkpoint.
        exported: see `card`.

    Raises:
        UsageError: `folder` is not a checkpoint of ours, or its run has not ended.
    """
    contents = _told(folder)
    try:
        return card(*contents, exported=exported)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, jinja2.TemplateError) as error:
        # only the two files can cause these
        raise UsageError(
            f"config.json or pruning.json of {folder} is damaged ({type(error).__name__}: {first_line(error)}); get the folder again"
        ) from error


def _told(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and pruning.json of a checkpoint; refuses the same folders as `card_of`."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name a checkpoint that shrink, prune or run wrote")
    if (folder / filenames.RESULT / filenames.PRUNING).is_file():
        raise UsageError(f"{folder} is the folder of a run; name its result, {folder / 'model'}")
    contents: list[dict[str, Any]] = []
    for name in (filenames.CONFIG, filenames.PRUNING):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a checkpoint of adapt-pruner: it has no {name}; name a folder that shrink, prune or run wrote"
            )
        try:
            data = read_json(folder / name)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / name} cannot be read ({type(error).__name__}); get the folder again") from error
        contents.append(data if isinstance(data, dict) else {})
    if not {"recipe", "figures"} <= contents[1].keys():
        raise UsageError(f"{folder / 'pruning.json'} does not say how the model was made; get the folder again")
    if isinstance(contents[1]["figures"], dict) and "params_after" not in contents[1]["figures"]:
        raise UsageError(
            f"{folder} is a checkpoint of a run that has not ended and so has no card; let the run end and name its result, its folder model"
        )
    return contents[0], contents[1]


def card(config: Mapping[str, Any], pruning: Mapping[str, Any], *, exported: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """The text of README.md.

    Args:
        config: config.json.
        pruning: pruning.json: `recipe`, `figures`, `history`, `made_by`, `dense_params` and, if known, `base`, see
            `checkpoint.origin`.
        exported: for the README.md of an exported folder: the form, and the config.json there.
    """
    from huggingface_hub import ModelCard

    config, pruning = with_common_names(_tame(config)), _tame(pruning)
    if not re.fullmatch(r"[\w.-]+", str(config.get("model_type"))):
        raise ValueError(f"model_type {config['model_type']!r}")
    recipe, figures = pruning["recipe"], pruning["figures"]
    dense = pruning.get("dense_params") or figures["params_before"]
    if not dense > 0:
        raise ValueError("dense_params")
    base, anew = said_of_base(pruning.get("base") or {"name": Path(recipe["model"]).name}), recipe.get("init") == "random"
    row, pruned, trained = _row(recipe["method"]), figures["params_after"] < dense, figures.get("trained_tokens")
    zeros = recipe.get("sparsity") or figures.get("sparsity_after")
    changed = "pruned" if not figures.get("grown_from") else "grown and pruned" if pruned else "grown"
    size = f" {changed} to {millions(figures['params_after'])}" if pruned or not (zeros or anew) else ""
    title = f"{base['name'].rpartition('/')[2]}{' from random weights' if anew else ''}{size}{f' with {zeros} zeros' if zeros else ''}"
    begun, after = _begun(recipe, figures, dense), f"{changed} and trained" if trained else changed
    command = _command(recipe)
    library = "transformers" if exported is None else getattr(form_of(exported[0]), "LIBRARY", "transformers")
    text = _template().render(
        front=_front_matter(pruning, base, title, library=library, towers=bool(towers_of(config))).to_yaml(),
        title=title, config=config, pruning=pruning, recipe=recipe, figures=figures, base=base, dense=dense, anew=anew, pruned=pruned, zeros=zeros, changed=changed,
        named=f"[{base['hub']}](https://huggingface.co/{base['hub']})" if base["hub"] else _code(base["name"]),
        trained=f"trained on {trained:,} tokens" if trained else "not trained afterwards",
        method=_method(recipe, row), paper=_ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", row.get("paper", "not known")),
        asked=_asked(recipe), sizes=list(_sizes(config)), form=exported and form_of(exported[0]).ABOUT,
        licence=f"{base['license']} ({base['license_name']})" if base.get("license_name") else base.get("license"),
        begun=begun, after=after, perplexities=list(_perplexities(pruning, begun, after)), towers=bool(towers_of(config)),
        judged=[(after if row["stage"] else begun, {name: value for name, value in row.items() if name != "stage"}) for row in figures.get("judged") or []],
        **_tasks(figures.get("tasks") or [], recipe["evaluation"].get("limit")),
        loading=list(loading(config) if exported is None else form_of(exported[0]).loading(with_common_names(exported[1]))),
        chats=list(_chats(figures, begun, after)), calibrated=_calibrated(recipe, figures), counted=counted, measured_on=_measured_on, needs=parts.needs_if_known, typed=typed,
        command=command, dumped=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        citations=_entries(recipe["method"]),
    )  # fmt: skip
    return str(ModelCard(text).content)


@functools.cache
def _template() -> jinja2.Template:
    """What a card says. The values that others wrote are never read as a template."""
    environment = jinja2.Environment(  # Markdown, so not escaped as HTML: the filters `plain` and `code` do
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "plain": _plain, "code": _code, "block": _block, "words": _words, "figure": lambda value, digits: f"{value:,.{digits}f}" if is_number(value) else "no number", "commas": "{:,}".format,
        "percent": "{:.1%}".format,
    }  # fmt: skip
    return environment.get_template("card.md")


def _tame(value: Any) -> Any:
    """Data of a file without characters that control a terminal or break a line. Text may still contain Markdown, see below."""
    if isinstance(value, Mapping):
        return {_tame(key): _tame(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tame(item) for item in value]
    return visible(value).replace("\n", " ") if isinstance(value, str) else value


def _plain(text: Any) -> str:
    """Text of others within ours, also in a table: characters with a meaning in Markdown or HTML are escaped."""
    return re.sub(r"([\\`*\[\]<>|&~#!]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))


def _code(text: Any) -> str:
    """Text of others as code in a line, also in a table; a backtick or bar would end the code or the cell and is replaced."""
    return f"`{str(text).replace('`', chr(0x2BB)).replace('|', chr(0x2223))}`"


def _block(text: str, language: str) -> str:
    """Text of others as a block of code, fenced by more backticks than it contains."""
    fence = "`" * max(3, *(1 + len(backticks) for backticks in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _front_matter(pruning: Mapping[str, Any], base: Mapping[str, Any], title: str, *, library: str, towers: bool) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, figures, measured = pruning["recipe"], pruning["figures"], _measured_result(pruning)
    anew = recipe.get("init") == "random"
    perplexities, text = figures.get("perplexities") or [], recipe["evaluation"]["source"]
    results = None
    if perplexities and is_number(perplexities[-1]) and text is not None and measured and not towers:
        of_hub = _hub_ids(text)
        result = EvalResult(
            task_type="text-generation",
            task_name="Next-token prediction",
            dataset_type=of_hub[0] if len(of_hub) == 1 else "text",
            dataset_name=_words(text),
            metric_type="perplexity",
            metric_value=round(perplexities[-1], 4),
            metric_name=_measured_on(recipe),
        )
        results = [result]
    tags = ["adapt-pruner", *(["trained-from-scratch"] if anew else ["pruned"]), recipe["method"]]
    read_texts = [recipe["training"]["source"]] + ([recipe["calibration"]["source"]] if _calibrated(recipe, figures) else [])
    hub_ids = sorted({hub_id for source in read_texts for hub_id in _hub_ids(source)})
    facts: dict[str, Any] = {
        # of the hub's four relations, the one for a model with other weights
        **({} if anew else {"base_model": base["hub"], "base_model_relation": base["hub"] and "finetune"}),
        "license": base.get("license"),
        "license_name": base.get("license_name"),
        "license_link": base.get("license_link"),
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification" if towers else "text-generation",
        "tags": tags,
        "datasets": hub_ids or None,
    }
    facts = {key: value for key, value in facts.items() if value is not None}
    return ModelCardData(**facts, model_name=title if results else None, eval_results=results)


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The present sizes of the layers, from the config."""
    if towers := towers_of(config):
        for name, tower in towers.items():
            for what, size in _sizes({"vocab_size": 0, **tower}):
                if what != "vocabulary" or name == "text":
                    yield f"{name} tower: {what}", size
        return
    layers = list(layers_of(config))
    yield "layers", f"{len(layers)}, over a stream of {config.get('sliced_hidden_size', config['hidden_size']):,} dimensions"
    for key, what, block in (
        ("num_attention_heads", "query heads", "attention"),
        ("num_key_value_heads", "KV heads", "attention"),
        ("intermediate_size", "MLP neurons", "mlp"),
    ):
        sizes = [layer[key] for layer in layers if block not in layer.get("skip", ()) and key in layer]
        if sizes:
            low, high = min(sizes), max(sizes)
            yield f"{what} a layer", f"{low:,}" if low == high else f"{low:,} to {high:,}"
    for block, what in (("attention", "attention"), ("mlp", "MLP")):
        if lacking := [str(index) for index, layer in enumerate(layers) if block in layer.get("skip", ())]:
            yield f"layers without {what}", ", ".join(lacking)
    yield "vocabulary", f"{config['vocab_size']:,} tokens"


def _begun(recipe: Mapping[str, Any], figures: Mapping[str, Any], dense: int) -> str:
    """The name of the model that the run measured first."""
    begun = "dense"
    if recipe.get("init") == "random":
        begun = "random weights"
    elif figures["params_before"] != dense:
        begun = "pruned before, as the run began"
    return f"{begun}, its vocabulary cut" if "params_after_vocabulary" in figures else begun


def _perplexities(pruning: Mapping[str, Any], begun: str, after: str) -> Iterator[tuple[str, int, Any, Any]]:
    """Name, parameters, perplexity and bits per byte of each model that the run measured."""
    figures = pruning["figures"]
    perplexities, bits = figures.get("perplexities") or [], figures.get("bits_per_byte") or []
    after_cuts = [figures.get(f"{key}_after_cuts") or [] for key in ("perplexities", "bits_per_byte")]
    stages = {note["stage"]: note["params"] for note in pruning.get("history") or []}
    params = figures.get("params_after_vocabulary", figures["params_before"])
    for stage, measured in enumerate(perplexities):
        where = "" if len(perplexities) == 2 else f", stage {stage}"
        params = stages.get(stage, params) if stage else params
        if stage == len(perplexities) - 1 and _measured_result(pruning):
            params = figures["params_after"]
        cut, bits_of_cut = (values[stage] if stage < len(values) else None for values in after_cuts)
        if cut is not None:
            yield f"pruned, after the cuts{where}", params, cut, bits_of_cut
        yield f"{after}{where}" if stage else begun, params, measured, bits[stage] if stage < len(bits) else None


def _chats(figures: Mapping[str, Any], begun: str, after: str) -> Iterator[str]:
    """How the model answered our prompts at the start and at the end, in a sentence each."""
    for event in chatted(figures):
        distance = (
            "" if event.kl is None or not event.stage else f"; {event.kl:.3f} nats a token from it on held-out conversations"
        )
        yield f"The {begun if event.stage == 0 else after} model {event.verdict}{distance}."


def _tasks(tasks: Sequence[Mapping[str, Any] | None], limit: int | None) -> dict[str, Any]:
    """The rows of the table of tasks, `tasks`, and how they were scored, `tasks_by`; no rows if none was scored."""
    first, last = tasks[0] if tasks else None, tasks[1] if len(tasks) > 1 else None  # None: not asked for at that time
    scored = last or first
    if scored is None:
        return {"tasks": [], "tasks_by": ""}
    before, now = ({(row["task"], row["metric"]): row for row in side["scores"]} if side else {} for side in (first, last))
    rows = []
    for task in scored["scores"]:
        pair = [by_name.get((task["task"], task["metric"])) for by_name in (before, now)]
        both = ["–" if row is None else score(row["value"], row["stderr"], share=row["accuracy"]) for row in pair]
        rows.append(f"| {_plain(task['task'])} | {_plain(task['metric'])} | {task['items']:,} | {both[0]} | {both[1]} |")
    if scored["average"] is not None and (not before or not now or before.keys() == now.keys()):
        both = [score(side["average"], side["stderr"], share=True) if side else "–" for side in (first, last)]
        rows.append(f"| average | | | {both[0]} | {both[1]} |")
    part = f"; the first {limit:,} items of each task" if limit is not None else ""
    data = ", ".join(dict.fromkeys(_plain(Path(task["data"]).name) for task in scored["scores"]))
    return {"tasks": rows, "tasks_by": f"{shots(task['shots'] for task in scored['scores'])}{part}; data: {data}"}


def _measured_result(pruning: Mapping[str, Any]) -> bool:
    """Whether the last perplexity is that of the result; a run that went on without held-out text has not measured it."""
    return len(pruning["figures"].get("perplexities") or []) == int(pruning["recipe"].get("stages", 1)) + 1


def _changed(recipe: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """A run's recipe, and the dotted keys in which it differs from what its method alone does with this model and size.

    Raises:
        UsageError: the recipe is of another version.
    """
    whole = read(dict(recipe))
    common = {key: getattr(whole, key) for key in ("method", "model", "budget", "sparsity", "latency", "latency_of", "seed")}
    return whole, differing(read(common), whole)


def _command(recipe: Mapping[str, Any]) -> str | None:
    """The `prune` command that makes the same model; None if the recipe trains or is of another version."""
    try:
        whole, changed = _changed(recipe)
    except UsageError:
        return None
    if whole.training.tokens or whole.stages > 1 or whole.evaluation.source is not None:
        return None
    sizes = {"--params": whole.budget, "--sparsity": whole.sparsity}
    target = [word for option, value in sizes.items() if value for word in (option, value)]
    target = target or ["--latency", whole.latency, "--latency-of", whole.latency_of]
    words = ["prune", whole.model, "-o", "small", *target, "--method", whole.method]
    words += ["--seed", str(whole.seed)] if whole.seed else []
    for key in changed:
        value = whole.model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        if key in _FLAGS and isinstance(value, str | int):
            words += [_FLAGS[key], str(value)]
        else:
            words += ["--set", f"{key}={json.dumps(value)}"]
    return typed(*words)


def _asked(recipe: Mapping[str, Any]) -> str:
    """The requested size of the model, in the words of the recipe."""
    if recipe["budget"]:
        return str(recipe["budget"])
    if "%" in (sparsity := recipe.get("sparsity") or ""):
        return f"{sparsity} of the weights of the linear layers in decoder layers zero"
    if sparsity:
        most, _, group = sparsity.partition(":")
        return f"at most {most} of every {group} weights of the linear layers in decoder layers not zero"
    work = {"prefill": "reading a prompt", "decode": "writing"}[recipe["latency_of"]]
    return f"{recipe['latency']} the base model's time of {work} on the machine it was made on"


def _calibrated(recipe: Mapping[str, Any], figures: Mapping[str, Any]) -> bool:
    """Whether calibration text was read. If the run did not count its tokens, the recipe tells."""
    if "calibration_tokens" in figures:
        return bool(figures["calibration_tokens"])
    if any("text" in parts.needs_if_known(key, recipe[key]) for key in ("reduce", "metric", "solver") if recipe[key]):
        return True
    return any(recipe[key] is not None for key in ("distance", "head_metric", "repair"))


def _measured_on(recipe: Mapping[str, Any]) -> str:
    evaluation = recipe["evaluation"]
    most = "" if evaluation["max_windows"] is None else f"at most {evaluation['max_windows']:d} "
    return f"{most}windows of {evaluation['window']:d} tokens that do not overlap"


def _words(source: str | Mapping[str, float] | None) -> str:
    """A text or a mixture in words, with links to the data sets of the hub."""
    if source is None:
        return "no text"
    shares = domains(source)
    names = {spec: by_model(spec) or _code(spec) for spec in shares}
    return ", ".join(names[spec] if len(shares) == 1 else f"{names[spec]} ({share:.0%})" for spec, share in shares.items())


def _hub_ids(source: str | Mapping[str, float] | None) -> list[str]:
    """The hub data sets that a text or mixture names."""
    specs = [] if source is None else list(domains(source))
    return [spec.partition("#")[0].split(":")[1] for spec in specs if spec.startswith("hub:")]


def _method(recipe: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The method and what it does. If the recipe changes its parts or axes, the new ones follow."""
    about = f"{_code(recipe['method'])}: {row.get('about', 'a method that this version does not have')}"
    try:
        changed = [key for key in _changed(recipe)[1] if key in _MAKES_A_METHOD]
    except UsageError:
        changed = []
    values = (f"{key}: {recipe[key] if isinstance(recipe[key], str) else json.dumps(recipe[key])}" for key in changed)
    return f"{about}; changed here: {', '.join(map(_code, values))}" if changed else about


def _row(method: str) -> dict[str, Any]:
    path = methods().get(ALIASES.get(method, method))
    row: dict[str, Any] = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
    return row


def _entries(method: str) -> list[str]:
    """BibTeX entries of our paper and of the papers that the method names."""
    text = PAPERS.read_text(encoding="utf-8").strip()
    by_number = {match[1]: entry for entry in text.split("\n\n") if (match := re.search(r"eprint = \{([\d.]+)\}", entry))}
    numbers = [_OWN_PAPER, *_ARXIV.findall(_row(method).get("paper", ""))]
    return [by_number[number] for number in dict.fromkeys(numbers) if number in by_number]
