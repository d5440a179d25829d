"""From Python: each command is one call on a name, a model in memory or a result; what it cannot take it refuses in a sentence."""

import ast
import copy
import gc
import importlib
import inspect
import json
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.utils import logging

import adapt_pruner as ap
from adapt_pruner import cli
from adapt_pruner.api.arguments import as_overrides, heard, named
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events import Warned
from adapt_pruner.errors import UsageError, option, settings, spelled_for_python
from adapt_pruner.recipe.prune_recipe import to_prune
from adapt_pruner.report import screen as notebook
from conftest import VOCAB, byte_tokenizer, read_json, tiny_model
from test_cli import call
from test_compare import pruned_here

__all__ = ["pruned_here"]  # a fixture

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"method": "adapt-pruner", "calibration_samples": 4, "calibration_length": 32, "settings": {"step": 0.1}}


@pytest.fixture(scope="module")
def small(tiny_folder: Path, text_file: Path) -> Any:
    """A result in a temporary folder."""
    return ap.prune(str(tiny_folder), params="80%", text=text_file, **QUICK)


def test_prune_does_what_the_command_does(
    tiny_folder: Path,
    text_file: Path,
    small: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--params", "80%", "--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 32]
    status, *_ = call(
        monkeypatch, capsys, "prune", tiny_folder, "-o", tmp_path / "out", *words, "--method", "adapt-pruner", "--set", "step=0.1"
    )
    assert status == 0
    same = ap.prune(tiny_folder, tmp_path / "same", params="80%", text=str(text_file), **QUICK)
    assert same.path == tmp_path / "same"
    recipe = read_json(tmp_path / "out" / "pruning.json")["recipe"]
    assert read_json(same.path / "pruning.json")["recipe"] == recipe
    assert read_json(small.path / "pruning.json")["recipe"] == recipe
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (same.path, tmp_path / "out"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    again = ap.prune(same.recipe, tmp_path / "again")
    assert (again.mask, again.figures["params_after"]) == (same.mask, same.figures["params_after"])
    (tmp_path / "recipe.yaml").write_text(same.recipe.to_yaml())
    assert call(monkeypatch, capsys, "prune", tmp_path / "recipe.yaml", "-o", tmp_path / "once more")[0] == 0
    assert read_json(tmp_path / "once more" / "pruning.json")["recipe"] == recipe
    status, _, err = call(monkeypatch, capsys, "prune", tmp_path / "recipe.yaml", "-o", tmp_path / "no", "--params", "70%")
    assert (status, "params would be ignored, since a recipe sets everything itself" in err) == (2, True)


@pytest.mark.parametrize("name", ["prune", "shrink", "run", "evaluate", "compare", "export", "verify", "chat"])
def test_arguments_and_defaults_are_those_of_the_command(name: str) -> None:
    command = next(each.callback for each in cli.app.registered_commands if each.callback and each.callback.__name__ == name)
    options = {key.replace("models", "model"): each for key, each in inspect.signature(command).parameters.items()}
    taken = inspect.signature(getattr(ap, name)).parameters
    assert options.keys() - {"as_json", "dry_run", "against"} <= taken.keys()
    assert taken.keys() - options.keys() <= {"tokenizer", "progress", "listen"}
    for key in options.keys() & taken.keys() - {"output", "prompt"}:
        assert taken[key].default == options[key].default, key
        typed = options[key].annotation.__metadata__[0]
        assert typed.help[:1].isupper() or typed.help[:1] == "0", f"{key} has a line in --help"


def test_an_option_is_held_to_the_bounds_of_its_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bounds of a signature are those of --help and of the parser, and a line of the docstring speaks of options there."""
    status, _, err = call(monkeypatch, capsys, "verify", "model", "--window", 1)
    assert (status, "--window" in err, "greater than or equal to 2" in err) == (2, True, True)
    monkeypatch.setenv("COLUMNS", "200")
    shown = call(monkeypatch, capsys, "compare", "--help")[1]
    assert "JSON files with input_ids instead of --calibration; each file is one draw. Can be repeated." in shown
    assert "Sizes to prune to, such as 80%,60%, for methods" in shown


def test_a_model_in_memory_is_pruned_and_left_as_it_is(tiny_folder: Path, text_file: Path, small: Any) -> None:
    loaded = load(str(tiny_folder))
    loaded.model.config.architectures = None  # which saving fills in
    weights, config = copy.deepcopy(loaded.model.state_dict()), loaded.model.config.to_dict()
    loaded.model.train()
    result = ap.prune(loaded.model, tokenizer=loaded.tokenizer, params="80%", text=[text_file], **QUICK)
    assert result.mask == small.mask
    assert result.figures["params_after"] == small.figures["params_after"]
    assert loaded.model.training
    assert loaded.model.config.to_dict() == config
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.model.state_dict().items())
    assert not Path(result.recipe.model).exists(), "the copy has gone"
    half = ap.prune(loaded.model.half(), tokenizer=loaded.tokenizer, params="80%", text=text_file, **QUICK)
    assert load(str(half.path)).dtype == torch.float16


def test_a_result_says_in_five_lines_what_it_is(small: Any, tiny_folder: Path) -> None:
    what, size, loss, cost, place = repr(small).splitlines()
    figures = small.figures
    assert what == f"{tiny_folder.name} pruned by adapt-pruner"
    assert f"50,784 → {figures['params_after']:,}" in size
    before, after = figures["calibration_losses"]
    assert f"{before:.3f} → {after:.3f} nats a token on the calibration text" in loss
    assert "GiB" in cost
    assert str(small.path) in place
    assert ".save(folder)" in place


def test_a_temporary_result_lives_as_long_as_its_object(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = ap.prune(tiny_folder, params=48_000, text={str(text_file): 2.0}, **QUICK)
    assert result.figures["params_after"] <= 48_000
    temporary = result.path
    kept = result.save(tmp_path / "kept")
    assert result.path == kept
    assert ".save(folder)" not in repr(result)
    assert {file.name for file in kept.iterdir()} == {file.name for file in temporary.iterdir()} >= {"README.md", "mask.json"}
    with pytest.raises(UsageError, match="exists and is not empty"):
        result.save(tmp_path / "kept")
    del result
    gc.collect()
    assert not temporary.exists()
    assert load(str(kept)).mask is not None


def test_a_result_is_measured_asked_exported_and_reported(
    small: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = small.evaluate(text_file, window=64, max_windows=4)
    words = ["--text", text_file, "--window", 64, "--max-windows", 4, "--json"]
    status, said, _ = call(monkeypatch, capsys, "eval", small.path, *words)
    assert status == 0
    assert json.loads(said)["perplexity"] == pytest.approx(measured.perplexity, rel=1e-6)
    assert measured.params == small.figures["params_after"] == sum(one.numel() for one in small.model.parameters())
    assert f"perplexity {measured.perplexity:.2f}" in repr(measured)
    assert ap.evaluate(small.model, tokenizer=small.tokenizer, text=text_file, window=64, max_windows=4).nll == measured.nll
    answer = ap.chat(small, "Hello", max_new_tokens=4)
    assert isinstance(answer, str)
    assert answer == small.chat("Hello", max_new_tokens=4)
    with pytest.warns(UserWarning, match="padding brings") as warned:
        assert small.export("padded", tmp_path / "plain") == tmp_path / "plain"
    assert Path(warned[0].filename) == Path(__file__), "a warning is of the line that called"
    page = small.report(tmp_path / "page.html").read_text()
    assert f"adapt-pruner eval FOLDER/{Path(str(small.recipe.model)).name} FOLDER/model --text SPEC" in page, (
        "whose folders are told to nobody"
    )
    assert "recipe.yaml -o again" not in page, "there is no folder of a run"
    assert small.report() == small.path.with_name("model.html")


def test_the_page_of_a_result_without_losses(tiny_folder: Path, tmp_path: Path) -> None:
    """A method that reads no text has losses that are not numbers; they are left out, as from a log."""
    small = ap.prune(tiny_folder, tmp_path / "out", params="80%", method="magnitude-all", settings={"step": 0.1})
    page = small.report(tmp_path / "page.html").read_text()
    assert "nan" not in " ".join(re.findall(r' d="[^"]*"', page))
    assert "∞" not in page


def test_a_path_from_the_home_folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small = ap.prune(tiny_folder, "~/small", params="80%", method="magnitude-all")
    assert (tmp_path / "small" / "config.json").is_file()
    with pytest.warns(UserWarning, match="padding brings"):
        assert small.export("padded", "~/plain") == tmp_path / "plain"
    assert (tmp_path / "plain" / "README.md").is_file()
    assert ap.verify("~/small", "~/plain")


@pytest.mark.parametrize("wrong", [{"limit": -1}, {"limit": 0}, {"max_windows": 0}])
def test_numbers_that_measure_nothing(wrong: dict[str, int], tiny_folder: Path) -> None:
    with pytest.raises(ap.UsageError, match=rf"{next(iter(wrong))}.*at least 1"):
        ap.evaluate(tiny_folder, tasks="piqa", text="python-docs:heldout", **wrong)


def test_a_failed_proof_is_false_and_says_why() -> None:
    failed = ap.Verification(passed=False, failures=["one", "two"], figures={"agreement": 0.5})
    assert not failed
    assert repr(failed).splitlines() == ["it failed:", "one", "two"]


def test_a_run_gives_the_same_kind_of_result_and_again_when_it_is_finished(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = ap.Recipe(
        model=str(tiny_folder), budget="85%", method="adapt-pruner", calibration={"source": str(text_file), "samples": 4, "length": 32},
        training={"source": str(text_file), "tokens": 2048, "batch_tokens": 512, "length": 64},
        evaluation={"source": str(text_file), "window": 64, "max_windows": 2},
    )  # fmt: skip
    heard_of: list[dict[str, Any]] = []
    first = ap.run(recipe, tmp_path / "run", listen=heard_of.append)
    assert {"start", "step", "saved"} <= {event["event"] for event in heard_of}
    before, after = first.figures["perplexities"]
    assert f"perplexity {before:.2f} → {after:.2f} on text that is not all held out" in repr(first), "it is the calibration text"
    assert "trained on 2,048 tokens" in repr(first)
    assert first.path == tmp_path / "run" / "model"
    second = ap.run(recipe, tmp_path / "run")
    assert second.figures == first.figures
    assert second.mask == first.mask
    assert second.report() == tmp_path / "run" / "report.html"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    third = ap.run(tmp_path / "recipe.yaml", settings={"training": {}, "evaluation": {}})
    assert third.figures["trained_tokens"] == 0
    assert third.path.is_dir()


def test_shrink_plans_and_trains(tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"method": "uniform", "calibration.samples": 2, "evaluation.max_windows": 2, "step": 0.1}
    (tmp_path / "text.txt").write_text("\n\n".join([text_file.read_text()] * 3))
    result = ap.shrink(tiny_folder, params="80%", tokens=4096, text=tmp_path / "text.txt", progress=True, settings=quick)
    assert result.figures["params_after"] <= 0.8 * 50_784
    assert result.figures["trained_tokens"] >= 4096
    assert "machine:" in capsys.readouterr().err, "the plan is told"


def test_compare_gives_a_table(pruned_here: list[Any], tiny_folder: Path, text_file: Path) -> None:
    loaded = load(str(tiny_folder))
    compared = ap.compare(
        loaded.model, tokenizer=loaded.tokenizer, methods=["random"], params=["80%"], text=text_file, draws=1,
        window=64, max_windows=2,
    )  # fmt: skip
    assert [row["method"] for row in compared.rows] == ["dense", "random"]
    assert len(pruned_here) == 1
    shown = repr(compared).splitlines()
    assert shown[0].split()[:3] == ["method", "parameters", "removed"]
    assert "50,784" in shown[1]
    assert compared.page.is_file()


MODEL = object()  # stands for the folder


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (3, {}, "model 3 is an int; give a folder, a .gguf file, a hub id or a packaged model as str or Path, a result, or a model"),
        (MODEL, {}, 'prune needs a size or a speed to reach; add params="80%" or latency="0.7x"'),
        (MODEL, {"params": [1]}, 'params [1] is a list; give a share such as "80%", or a number of parameters such as "110M" or 110_000_000'),
        (MODEL, {"params": 0.8}, "params 0.8 is a float; give a share"),
        (MODEL, {"params": True}, "params True is a bool; give a share"),
        (MODEL, {"params": "80%", "text": 3}, "text 3 is an int; give a file, a folder or another text as str or Path, a list of them"),
        (MODEL, {"params": "80%", "text": [b"x"]}, "text b'x' is a bytes; give a file, a folder or another text"),
        (MODEL, {"params": "80%", "text": []}, "the mixture names no text"),
        (MODEL, {"params": "80%", "text": "gone.txt"}, "gone.txt"),
        (MODEL, {"params": "80%", "latency": "0.7x"}, 'params="80%" and latency="0.7x" both say how far to prune'),
        (MODEL, {"params": "80%", "settings": {"stepp": 1}}, "recipe key 'stepp' is not known; did you mean 'step'?"),
        (MODEL, {"params": "80%", "settings": 7}, "settings 7 is an int; give a dict"),
        (MODEL, {"params": "80%", "settings": {"budget": "70%"}}, "budget is set by its own option and by settings; leave one of them out"),
        (MODEL, {"params": "80%", "tokenizer": byte_tokenizer()}, "has its own; leave tokenizer out"),
        (MODEL, {"params": "80%", "method": "nothing"}, "method 'nothing' is not known"),
        (MODEL, {"params": "80%", "method": 3}, "method 3 is an int; give a name from `adapt-pruner methods`"),
        (MODEL, {"params": "80%", "method": "wanda"}, 'sparsity="50%" or sparsity="2:4"'),
        (MODEL, {"params": "80%", "output": 5}, "output 5 is an int; give a path, as str or Path"),
        ("nothing", {"params": "80%"}, "model 'nothing' does not exist"),
        (ap.Recipe(model="x", budget="80%"), {"params": "70%", "seed": 1}, "params and seed would be ignored, since a recipe sets everything itself"),
    ],
)  # fmt: skip
def test_what_prune_cannot_take_is_refused_in_a_sentence(model: Any, given: dict[str, Any], said: str, tiny_folder: Path) -> None:
    with pytest.raises(UsageError) as refused:
        ap.prune(str(tiny_folder) if model is MODEL else model, **given)
    assert said in str(refused.value)


def test_a_model_in_memory_that_cannot_be_taken_is_refused() -> None:
    model, tokenizer = tiny_model(vocab_size=VOCAB), byte_tokenizer()
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    stranger = OPTForCausalLM(OPTConfig(**sizes, vocab_size=VOCAB))
    quantised = tiny_model(vocab_size=VOCAB)
    quantised.config.quantization_config = {"quant_method": "gptq"}
    adapted = tiny_model(vocab_size=VOCAB)
    adapted.peft_config = {}
    cases = [
        (model, None, "model is a LlamaForCausalLM without its tokenizer; give tokenizer=AutoTokenizer.from_pretrained(…)"),
        (model, "llama", "model is a LlamaForCausalLM with a str as tokenizer"),
        (stranger, tokenizer, "nothing of a model of type 'opt' may be removed"),
        (quantised, tokenizer, "model is a quantised LlamaForCausalLM"),
        (adapted, tokenizer, "merge it first: model = model.merge_and_unload()"),
        (tiny_model(vocab_size=VOCAB).to("meta"), tokenizer, "with weights on the device meta"),
        (torch.nn.Linear(2, 2), tokenizer, "is a Linear; give a folder"),
    ]
    for one, its, said in cases:
        with pytest.raises(UsageError) as refused, named(one, its):
            pass
        assert said in str(refused.value)


def test_what_other_calls_cannot_take_is_refused_in_a_sentence(small: Any, text_file: Path, tmp_path: Path) -> None:
    for refused, said in (
        (
            lambda: ap.evaluate(small),
            "nothing to measure; give text for perplexity, chat for answers, tasks for scores, or several of them",
        ),
        (lambda: ap.evaluate(small, text=[text_file]), "give one text, as str or Path"),
        (lambda: ap.evaluate(small, text=text_file, window="8"), "window '8' is a str; give a whole number of at least 2"),
        (lambda: ap.evaluate(small, text=text_file, window=1), "window 1 is too small"),
        (lambda: ap.evaluate(small, text=text_file, dtype="int8"), "dtype 'int8' is not known"),
        (lambda: ap.export(small, "gguff", tmp_path / "x"), "form 'gguff' is not known; did you mean 'gguf'?"),
        (
            lambda: ap.export(small, "padded", tmp_path / "x", quant="q8_0"),
            'quant="q8_0" works only with to="gguf"; the form padded sets its number format itself',
        ),
        (lambda: ap.verify(small), "has no mask over weights, so there is nothing to verify without an artefact"),
        (lambda: ap.chat(small, " "), "the prompt is empty; write a question or an instruction"),
        (lambda: ap.chat(small, 7), "prompt 7 is an int; give text"),
        (lambda: ap.chat(small, "Hi", max_new_tokens=0), "max_new_tokens 0 is too small"),
        (lambda: ap.chat(small, "Hi", temperature="0.7"), "temperature '0.7' is a str; give a number from 0 to 100"),
        (lambda: ap.chat(small, "Hi", temperature=-1), "temperature -1 is too small; give a number from 0 to 100"),
        (lambda: ap.chat(small, "Hi", temperature=101), "temperature 101 is too large; give a number from 0 to 100"),
        (
            lambda: ap.compare(small, methods="random", params=["80%", 0.6], text=text_file),
            'params 0.6 is a float; give sizes such as ["80%", "110M", 90_000_000]',
        ),
        (lambda: ap.shrink(small, params="80%", minutes="an hour"), "minutes 'an hour' is a str; give a number"),
        (
            lambda: ap.compare(small, methods="uniform", params="80%", text=text_file, calibration_ids="gone.json"),
            "'gone.json' do not exist",
        ),
        (
            lambda: ap.chat(small, "x", seed=1),
            "seed=1 has no effect at temperature 0, which draws nothing; add temperature=0.7, or leave seed out",
        ),
        (lambda: ap.shrink(small, params="80%"), 'give one of minutes=60, hours=1 and tokens="2M"'),
        (lambda: ap.run("nothing.yaml"), "recipe 'nothing.yaml' does not exist"),
        (lambda: ap.run(7), "recipe '7' does not exist; give a YAML file or a built-in one"),
        (lambda: ap.compare(small, methods="random", text=text_file), "compare needs sizes to compare at"),
        (lambda: ap.compare(small, methods=["x"], params="80%", text=text_file), "method 'x' is not known"),
    ):
        with pytest.raises(UsageError) as raised:
            refused()
        assert said in str(raised.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prams'"):
        ap.prune(small, prams="80%")  # type: ignore[call-arg]


def test_errors_name_arguments_to_python_and_options_to_a_shell() -> None:
    for in_shell, in_python, spelled in (
        ("--params 80%", 'params="80%"', lambda: option("params", "80%")),
        ("--calibration-ids", "calibration_ids", lambda: option("calibration_ids")),
        ("--temperature 0.7", "temperature=0.7", lambda: option("temperature", 0.7)),
        ("--trust-remote-code", "trust_remote_code=True", lambda: option("trust_remote_code", True)),
        ("--set", "settings", lambda: option("settings")),
        ("--set repair=null", 'settings={"repair": None}', lambda: settings({"repair": None})),
        ("--set a.b=true --set c=50%", 'settings={"a.b": True, "c": "50%"}', lambda: settings({"a.b": True, "c": "50%"})),
    ):
        assert spelled() == in_shell
        with spelled_for_python():
            assert spelled() == in_python
    assert as_overrides({"a.b": None, "c": "80%", "d": [1]}) == ["a.b=null", 'c="80%"', "d=[1]"]


def test_code_of_a_model_runs_only_if_it_may(tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def loading(name: str, *, trust_remote_code: bool, **others: Any) -> Any:
        seen.append(trust_remote_code)
        raise UsageError(f"pass {option('trust_remote_code', True)} if you trust it")

    for home in ("run.start", "checkpoint.load"):
        monkeypatch.setattr(importlib.import_module(f"adapt_pruner.{home}"), "load", loading)
    calls: list[Callable[..., Any]] = [
        lambda **how: ap.prune(tiny_folder, params="80%", **how),
        lambda **how: ap.shrink(tiny_folder, params="80%", tokens=9, **how),
        lambda **how: ap.evaluate(tiny_folder, text=text_file, **how),
        lambda **how: ap.verify(tiny_folder, tiny_folder, text=text_file, **how),
        lambda **how: ap.export(tiny_folder, "padded", "x", **how),
        lambda **how: ap.chat(tiny_folder, "Hi", **how),
    ]
    for one in calls:
        for how in ({}, {"trust_remote_code": True}):
            with pytest.raises(UsageError, match="pass trust_remote_code=True if you trust it"):
                one(**how)
    assert seen == [False, True] * len(calls)


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_examples_of_the_python_page_run(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- executed by tests/test_api.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "my.txt").write_text("".join(lines[:300]))
    (tmp_path / "held-out.txt").write_text("".join(lines[300:]))
    monkeypatch.chdir(tmp_path)
    quick = ["calibration.samples=2", "calibration.length=32", "calibration.self_generated=4", "step=0.3"]
    monkeypatch.setattr(
        "adapt_pruner.recipe.prune_recipe.to_prune", lambda asked, overrides: to_prune(asked, overrides=[*overrides, *quick])
    )
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # windows longer than the tiny model reads, padding that grows
        for block in blocks:
            exec(compile(block, "docs/api.md", "exec"), names)
    assert names["small"].path == Path("small")
    assert names["smaller"].figures["params_after"] <= 0.7 * 50_784
    assert {"small", "small-plain", "small-stock", "small.html", "as-the-recipe-says"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "parameters  50,784 → " in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_call_on_a_page_can_be_made(page: Path) -> None:
    """The names are there, and take these arguments."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        for call_ in calls:
            spelled = ast.unparse(call_.func)
            if spelled.startswith(("ap.", "adapt_pruner.")) and spelled.count(".") == 1 and spelled != "ap.Recipe":
                inspect.signature(getattr(ap, spelled.partition(".")[2])).bind(
                    *call_.args, **{key.arg or "": key for key in call_.keywords}
                )


def test_transformers_speaks_again_afterwards_and_warnings_are_python_s() -> None:
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    with heard(None, progress=False) as tell:
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        with pytest.warns(UserWarning, match="^window of 9 is long$"):
            tell(Warned(message="window of 9 is long"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
    logging.set_verbosity_error()
    heard_of: list[dict[str, Any]] = []
    with warnings.catch_warnings(), heard(heard_of.append, progress=False) as tell:
        warnings.simplefilter("error")
        tell(Warned(message="told"))
    assert heard_of == [{"event": "warning", "message": "told"}]


def test_a_notebook_shows_one_output_that_changes_and_keeps_its_lines(
    tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data))
    made: list[Any] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        made.append(display_id)
        shown.append(data)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))  # type: ignore[arg-type]
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(notebook, "_NOTEBOOK_EVERY", 0.01)
    ap.prune(tiny_folder, params="80%", text=text_file, progress=True, listen=lambda event: time.sleep(0.02), **QUICK)
    assert made == [True], "one output"
    assert "starting" in shown[0]["text/plain"]
    moving = [one for one in shown if "neurons" in one["text/plain"]]
    assert len(moving) > 3
    assert "%" in moving[-1]["text/plain"].splitlines()[-1], "the bar is below the lines"
    assert "<pre" in moving[0]["text/html"]
    assert "span style" in moving[0]["text/html"]
    last = shown[-1]["text/plain"].splitlines()
    assert last[0] == f"loading {tiny_folder}"
    assert last[-1].startswith("stage 1, iteration"), "the bar is gone"
    assert not any("scoring" in line for line in last), "lines that come often are the bar's"
    said = capsys.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize("known", [True, False])
def test_a_model_in_memory_may_have_any_generation_config(known: bool, text_file: Path) -> None:
    """transformers refuses to save sampling settings without do_sample once anything was changed."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64)
    model = tiny_model(vocab_size=VOCAB) if known else AutoModelForCausalLM.from_config(config)
    model.generation_config.temperature = 0.6
    model.generation_config.pad_token_id = 0
    found = ap.evaluate(model, tokenizer=byte_tokenizer(), text=text_file, window=16, max_windows=2)
    assert found.perplexity > 1
