"""The README.md of a checkpoint, a model card for the hub, made of the folder's own JSON and the methods' files.

`card` is a function of config.json and pruning.json. So with one version of this package the same folder gives the same text,
wherever and whenever it is made. The card states what the run recorded, and leaves out what was not measured.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.checkpoint.origin import said_of_base
from adapt_pruner.core.events import Listener, Warned
from adapt_pruner.core.files import why, write_whole
from adapt_pruner.core.strict_json import read_json
from adapt_pruner.core.visible import visible
from adapt_pruner.core.words import counted, millions, score, shots, typed
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.export import form_of
from adapt_pruner.export.loading import layers_of, loading
from adapt_pruner.recipe import ALIASES, PAPERS, Recipe, differing, in_todays_keys, methods, parts, read

__all__ = ["card", "card_of", "try_card", "write_card", "write_card_of_export"]

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
        write_whole(folder / "README.md", text)
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
    if not (source / "pruning.json").is_file():
        return None
    try:
        config = out / "config.json"
        shape = read_json(config if config.is_file() else source / "config.json")  # some forms have no config of their own
        write_whole(out / "README.md", card_of(source, exported=(form, shape)))
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
        listen(Warned(message=message).to_dict())


def card_of(folder: Path, *, exported: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """The card of a checkpoint, read from its config.json and pruning.json.

    Args:
        folder: the checkpoint.
        exported: see `card`.

    Raises:
        UsageError: `folder` is not a checkpoint of ours, or its run has not ended.
    """
    told = _told(folder)
    try:
        return card(*told, exported=exported)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:  # only the two files can cause these
        raise UsageError(
            f"config.json or pruning.json of {folder} is damaged ({type(error).__name__}: {first_line(error)}); get the folder again"
        ) from error


def _told(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and pruning.json of a checkpoint; refuses the same folders as `card_of`."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name a checkpoint that shrink, prune or run wrote")
    if (folder / "model" / "pruning.json").is_file():
        raise UsageError(f"{folder} is the folder of a run; name its result, {folder / 'model'}")
    contents: list[dict[str, Any]] = []
    for name in ("config.json", "pruning.json"):
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
    return contents[0], contents[1] | {"recipe": in_todays_keys(contents[1]["recipe"])}


def card(config: Mapping[str, Any], pruning: Mapping[str, Any], *, exported: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """The text of README.md.

    Args:
        config: config.json.
        pruning: pruning.json: `recipe`, `figures`, `history`, `made_by`, `dense_params` and, if known, `base`, see
            `checkpoint.origin`.
        exported: for the README.md of an exported folder: the form, and the config.json there.
    """
    from huggingface_hub import ModelCard

    config, pruning = _tame(config), _tame(pruning)
    if not re.fullmatch(r"[\w.-]+", str(config.get("model_type"))):
        raise ValueError(f"model_type {config['model_type']!r}")
    if not (pruning.get("dense_params") or pruning["figures"]["params_before"]) > 0:
        raise ValueError("dense_params")
    recipe, figures = pruning["recipe"], pruning["figures"]
    base = said_of_base(pruning.get("base") or {"name": Path(recipe["model"]).name})
    smaller = figures["params_after"] < (pruning.get("dense_params") or figures["params_before"])
    zeros = recipe.get("sparsity") or figures.get("sparsity_after")
    size = f" pruned to {millions(figures['params_after'])}" if smaller or not zeros else ""
    size = " from random weights" + (size if smaller else "") if _is_from_random(recipe) else size
    title = base["name"].rpartition("/")[2] + size + (f" with {zeros} zeros" if zeros else "")
    sections = [
        f"# {_plain(title)}",
        _summary(config, pruning, base, form=exported and exported[0]),
        "## Results",
        *_results(pruning),
        "## How to load it",
        *(loading(config) if exported is None else form_of(exported[0]).loading(exported[1])),
        "## How it was made",
        *_making(pruning),
        "## Citation",
        "```bibtex\n" + "\n\n".join(_entries(recipe["method"])) + "\n```",
    ]
    front = _front_matter(pruning, base, title).to_yaml()
    return str(ModelCard(f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n").content)


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


def _block(language: str, text: str) -> str:
    """Text of others as a block of code, fenced by more backticks than it contains."""
    fence = "`" * max(3, *(1 + len(backticks) for backticks in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _front_matter(pruning: Mapping[str, Any], base: Mapping[str, Any], title: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, figures, measured = pruning["recipe"], pruning["figures"], _measured_result(pruning)
    anew = _is_from_random(recipe)
    perplexities, text = figures.get("perplexities") or [], recipe["evaluation"]["source"]
    results = None
    if perplexities and _is_number(perplexities[-1]) and text is not None and measured:
        result = EvalResult(
            task_type="text-generation",
            task_name="Next-token prediction",
            dataset_type=_one_hub_id(text) or "text",
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
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        "datasets": hub_ids or None,
    }
    known = {key: value for key, value in facts.items() if value is not None}
    return ModelCardData(**known, model_name=title if results else None, eval_results=results)


def _is_from_random(recipe: Mapping[str, Any]) -> bool:
    """Whether the model began with random weights, so that of its base it has only the shape."""
    return recipe.get("init") == "random"


def _summary(config: Mapping[str, Any], pruning: Mapping[str, Any], base: Mapping[str, Any], *, form: str | None) -> str:
    recipe, figures = pruning["recipe"], pruning["figures"]
    dense = pruning.get("dense_params") or figures["params_before"]
    row, pruned = _row(recipe["method"]), figures["params_after"] < dense
    named = f"[{base['hub']}](https://huggingface.co/{base['hub']})" if base["hub"] else _code(base["name"])
    trained = f"trained on {figures['trained_tokens']:,} tokens" if figures.get("trained_tokens") else "not trained afterwards"
    lines = [
        f"The shape of {named} with random weights, {'pruned by adapt-pruner and ' if pruned else ''}{trained}."
        if _is_from_random(recipe)
        else f"{named}, pruned by adapt-pruner and {trained}.",
        "",
        "| | |",
        "|---|---|",
        f"| {'shape of' if _is_from_random(recipe) else 'base model'} | {named}, {dense:,} parameters |",
        f"| method | {_method(recipe, row)} |",
        f"| its source | {_linked(row.get('paper', 'not known'))} |",
        f"| budget | {_plain(_asked(recipe))} |"
        if recipe.get("sparsity")
        else f"| budget | {_plain(_asked(recipe))}, that is at most {figures['budget']:,} parameters |",
        f"| reached | {figures['params_after']:,} parameters, {figures['params_after'] / dense:.1%} of {'that shape' if _is_from_random(recipe) else 'the base model'}'s |",
        *(
            [
                f"| not zero | {figures['nonzero_after']:,} parameters, {figures['nonzero_after'] / figures['params_after']:.1%} of those stored |"
            ]
            if figures.get("nonzero_after")
            else []
        ),
        *(f"| {what} | {sizes} |" for what, sizes in _sizes(config)),
        f"| weights | {_plain(config.get('dtype') or config.get('torch_dtype'))} |",
        f"| licence | {_license(base)} |",
        *([f"| form | {form_of(form).ABOUT} |"] if form else []),
    ]
    if figures["params_before"] != dense:
        lines.insert(5, f"| began from | a model already pruned, of {figures['params_before']:,} parameters |")
    elif base.get("file"):
        lines.insert(5, f"| began from | the weights in {_code(base['file'])}, dequantised |")
    return "\n".join(lines)


def _license(base: Mapping[str, Any]) -> str:
    if base.get("license") is None:
        return "not known; look up that of the base model before you share or use this one"
    named = f"{base['license']} ({base['license_name']})" if base.get("license_name") else base["license"]
    link = f", {base['license_link']}" if base.get("license_link") else ""
    return f"{_plain(named)}{link}, that of the base model (found in: {_plain(base['license_from'])})"


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The present sizes of the layers, from the config."""
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


def _results(pruning: Mapping[str, Any]) -> Iterator[str]:
    recipe, figures = pruning["recipe"], pruning["figures"]
    perplexities, bits = figures.get("perplexities") or [], figures.get("bits_per_byte") or []
    tasks = figures.get("tasks") or []
    if not perplexities and not tasks:
        anew = _is_from_random(recipe)  # then the base may have no weights
        yield (
            f"The run measured no perplexity: its recipe names no text to evaluate on. To measure it{'' if anew else ', and the base model beside it'}:\n\n"
            + _block("sh", typed("eval", *([] if anew else [recipe["model"]]), ".", "--text", "python-docs:heldout"))
        )
        return
    begun = (
        "pruned before, as the run began"
        if figures["params_before"] != (pruning.get("dense_params") or figures["params_before"])
        else "dense"
    )
    begun = "random weights" if _is_from_random(recipe) else begun
    begun += ", its vocabulary cut" if "params_after_vocabulary" in figures else ""
    after = "pruned and trained" if figures.get("trained_tokens") else "pruned"
    if perplexities:
        yield from _perplexities(pruning, perplexities, bits, begun, after)
    if tasks:
        yield from _tasks(tasks, recipe["evaluation"].get("limit"), begun, after)
    lacking = "for bias or safety" if tasks else "on tasks, nor for bias or safety"
    yield f"It was not evaluated {lacking}; what is known of the base model in this respect need not hold for it."


def _perplexities(
    pruning: Mapping[str, Any], perplexities: Sequence[Any], bits: Sequence[Any], begun: str, after: str
) -> Iterator[str]:
    recipe, figures = pruning["recipe"], pruning["figures"]
    stages = {note["stage"]: note["params"] for note in pruning.get("history") or []}
    params = [figures.get("params_after_vocabulary", figures["params_before"])]
    for stage in range(1, len(perplexities)):
        params.append(stages.get(stage, params[-1]))
    if _measured_result(pruning):
        params[-1] = figures["params_after"]
    names = [begun, *(after if len(perplexities) == 2 else f"{after}, stage {stage}" for stage in range(1, len(perplexities)))]
    lines = ["| model | parameters | perplexity | bits per byte |", "|---|---:|---:|---:|"]
    after_cuts = [figures.get(f"{key}_after_cuts") or [] for key in ("perplexities", "bits_per_byte")]
    for index, (name, size, measured) in enumerate(zip(names, params, perplexities, strict=True)):
        cut, bits_of_cut = (known[index] if index < len(known) else None for known in after_cuts)
        if cut is not None:
            where = "" if len(perplexities) == 2 else f", stage {index}"
            lines.append(f"| pruned, after the cuts{where} | {size:,} | {_figure(cut, 2)} | {_figure(bits_of_cut, 4)} |")
        per_byte = bits[index] if index < len(bits) else None
        lines.append(f"| {name} | {size:,} | {_figure(measured, 2)} | {_figure(per_byte, 4)} |")
    yield "\n".join(lines)
    if recipe["evaluation"]["source"] is None:
        yield "Measured by the run itself, on a text that its recipe no longer names."
        return
    yield f"Measured by the run itself on {_words(recipe['evaluation']['source'])}: {_measured_on(recipe)}."
    if figures.get("not_held_out"):
        yield f"This text is not all held out: {'; '.join(map(_plain, figures['not_held_out']))}."


def _tasks(tasks: Sequence[Mapping[str, Any]], limit: int | None, begun: str, after: str) -> Iterator[str]:
    first, last = tasks[0], tasks[1] if len(tasks) > 1 else None  # either is None if the recipe asked for no tasks at that time
    known = last or first
    if known is None:
        return
    before, now = ({(one["task"], one["metric"]): one for one in scored["scores"]} if scored else {} for scored in (first, last))
    lines = [f"| task | metric | items | {begun} | {after} |", "|---|---|---:|---:|---:|"]
    for one in known["scores"]:
        both = [_score(scored.get((one["task"], one["metric"]))) for scored in (before, now)]
        lines.append(f"| {_plain(one['task'])} | {_plain(one['metric'])} | {one['items']:,} | {both[0]} | {both[1]} |")
    if known["average"] is not None and (not before or not now or before.keys() == now.keys()):
        both = [score(each["average"], each["stderr"], share=True) if each else "–" for each in (first, last)]
        lines.append(f"| average | | | {both[0]} | {both[1]} |")
    yield "\n".join(lines)
    part = f"; the first {limit:,} items of each task" if limit is not None else ""
    data = ", ".join(dict.fromkeys(_plain(Path(one["data"]).name) for one in known["scores"]))
    yield f"Scored by the run itself with lm-eval: accuracies in per cent ± standard error, {shots(one['shots'] for one in known['scores'])}{part}; data: {data}."


def _score(one: Mapping[str, Any] | None) -> str:
    return "–" if one is None else score(one["value"], one["stderr"], share=one["accuracy"])


def _measured_result(pruning: Mapping[str, Any]) -> bool:
    """Whether the last perplexity is that of the result; a run that went on without held-out text has not measured it."""
    return len(pruning["figures"].get("perplexities") or []) == int(pruning["recipe"].get("stages", 1)) + 1


def _making(pruning: Mapping[str, Any]) -> Iterator[str]:
    recipe, figures = pruning["recipe"], pruning["figures"]
    calibration, training = recipe["calibration"], recipe["training"]
    lines = []
    if not _calibrated(recipe, figures):
        lines.append("* Calibration: none; the method reads no text.")
    else:
        text = f"the tokens in {_code(calibration['ids'])}" if calibration["ids"] else _words(calibration["source"])
        drawn = f"{calibration['samples']:d} sequences of {calibration['length']:d} tokens an iteration, {counted(figures['iterations'], 'iteration')}"
        total = f"; {figures['calibration_tokens']:,} tokens read in all" if figures.get("calibration_tokens") else ""
        lines.append(f"* Calibration: {text}, {'every iteration' if calibration['ids'] else drawn}{total}.")
        if calibration.get("self_generated") and recipe.get("repair"):
            lines.append(
                f"* The repair also read {calibration['self_generated']:,} sequences that the model as it was at the start wrote."
            )
        if calibration.get("repair_samples") and recipe.get("repair"):
            lines.append(f"* The repair also read {calibration['repair_samples']:,} further sequences of this text.")
    if figures.get("trained_tokens"):
        lines.append(
            f"* Training: {_words(training['source'])}; {figures['trained_tokens']:,} tokens over "
            f"{counted(recipe['stages'], 'stage')} with {_code(training['objective'])}, peak learning rate {training['lr']:g}."
        )
        if "teacher" in parts.needs_if_known("objective", training["objective"]):
            lines.append(f"* Teacher: {_plain(training['teacher'] or 'the base model')}.")
    else:
        lines.append("* Training: none.")
    if "vocabulary_after" in figures:
        lines.append(
            f"* Vocabulary: {figures['vocabulary_before']:,} tokens before, {figures['vocabulary_after']:,} after, by their use in "
            f"{_words(recipe['vocabulary']['source'])}."
        )
    lines.append(f"* Made by {_plain(pruning['made_by'])}.")
    yield "\n".join(lines)
    if (command := _command(recipe)) is not None:
        yield f"The command:\n\n{_block('sh', command)}"
        opening = "The same as a recipe, with every default"
    else:
        opening = "The recipe; save it as recipe.yaml, then: `adapt-pruner run recipe.yaml -o runs/again`"
    dumped = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    yield f"<details>\n<summary>{opening}</summary>\n\n{_block('yaml', dumped.rstrip())}\n\n</details>"


def _changed(recipe: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """A run's recipe, and the dotted keys in which it differs from what its method alone does with this model and size.

    Raises:
        UsageError: the recipe is of another version.
    """
    asked = read(dict(recipe))
    common = {key: getattr(asked, key) for key in ("method", "model", "budget", "sparsity", "latency", "latency_of", "seed")}
    return asked, differing(read(common), asked)


def _command(recipe: Mapping[str, Any]) -> str | None:
    """The `prune` command that makes the same model; None if the recipe trains or is of another version."""
    try:
        asked, changed = _changed(recipe)
    except UsageError:
        return None
    if asked.training.tokens or asked.stages > 1 or asked.evaluation.source is not None:
        return None
    said = {"--params": asked.budget, "--sparsity": asked.sparsity}
    target = [word for option, value in said.items() if value for word in (option, value)] or [
        "--latency",
        asked.latency,
        "--latency-of",
        asked.latency_of,
    ]
    words = ["prune", asked.model, "-o", "small", *target, "--method", asked.method]
    words += ["--seed", str(asked.seed)] if asked.seed else []
    for key in changed:
        value = asked.model_dump(mode="json")
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
    if recipe.get("sparsity"):
        return (
            f"{recipe['sparsity']} of the weights of the linear layers in decoder layers zero"
            if "%" in recipe["sparsity"]
            else (
                f"at most {recipe['sparsity'].partition(':')[0]} of every {recipe['sparsity'].partition(':')[2]} weights of the linear layers in "
                "decoder layers not zero"
            )
        )
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
    asked = recipe["evaluation"]
    most = "" if asked["max_windows"] is None else f"at most {asked['max_windows']:d} "
    return f"{most}windows of {asked['window']:d} tokens that do not overlap"


def _words(source: str | Mapping[str, float] | None) -> str:
    """A text or a mixture in words, with links to the data sets of the hub."""
    if source is None:
        return "no text"
    shares = domains(source)
    said = []
    for spec, share in shares.items():
        name = "text that the model wrote itself" if spec == SELF else _code(spec)
        said.append(name if len(shares) == 1 else f"{name} ({share:.0%})")
    return ", ".join(said)


def _hub_ids(source: str | Mapping[str, float] | None) -> list[str]:
    """The hub data sets that a text or mixture names."""
    specs = [] if source is None else list(domains(source))
    return [spec.partition("#")[0].split(":")[1] for spec in specs if spec.startswith("hub:")]


def _one_hub_id(source: str | Mapping[str, float] | None) -> str | None:
    hub_ids = _hub_ids(source)
    return hub_ids[0] if len(hub_ids) == 1 else None


def _method(recipe: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The method and what it does. If the recipe changes its parts or axes, the new ones follow."""
    about = f"{_code(recipe['method'])}: {row.get('about', 'a method that this version does not have')}"
    try:
        own = [key for key in _changed(recipe)[1] if key in _MAKES_A_METHOD]
    except UsageError:
        own = []
    said = (f"{key}: {recipe[key] if isinstance(recipe[key], str) else json.dumps(recipe[key])}" for key in own)
    return f"{about}; changed here: {', '.join(map(_code, said))}" if own else about


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


def _linked(paper: str) -> str:
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if _is_number(value) else "no number"
