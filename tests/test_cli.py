"""The command line: its contract, and one sentence with an exit status for everything that goes wrong."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import cli, recipe
from adapt_pruner.core.system import provenance
from conftest import HANGS, VOCAB, byte_tokenizer, log_of, read_json, tiny_model

COMMAND = [sys.executable, "-m", "adapt_pruner"]


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Run the command line in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["adapt-pruner", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


def small(text_file: Path) -> list[Any]:
    text = ["--calibration", text_file, "--calibration-samples", 8, "--calibration-length", 32]
    return [*text, "--set", "calibration.self_generated=4"]


def test_prune_eval_and_inspect_in_json(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    status, out, _ = ask(
        "prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *small(text_file), "--seed", 3, "--json"
    )
    figures = json.loads(out)
    assert status == 0
    wanted = "params_before params_after decoder_params_before decoder_params_after seconds peak_rss_bytes method seed"
    assert set(wanted.split()) <= figures.keys()
    assert figures["method"] == "adaptive-ls-v1", "what wins is the default"
    assert figures["seed"] == 3
    assert figures["params_after"] <= 0.8 * figures["params_before"]
    gone = figures["params_before"] - figures["params_after"]
    assert figures["decoder_params_before"] - figures["decoder_params_after"] == gone, "only the layers shrink"

    status, out, _ = ask("eval", tmp_path / "out", "--text", text_file, "--window", 64, "--max-windows", 5, "--json")
    measured = json.loads(out)
    assert {"perplexity", "nll", "tokens", "windows", "params", "decoder_params", "seconds"} <= measured.keys()
    assert measured["windows"] == 5
    assert measured["tokens"] == 5 * 63
    assert measured["params"] == figures["params_after"]
    assert measured["decoder_params"] == figures["decoder_params_after"]

    status, out, _ = ask("inspect", tmp_path / "out", "--json")
    anatomy = json.loads(out)
    assert sum(layer["params"] for layer in anatomy["layers"]) == figures["decoder_params_after"]
    assert anatomy["share_of_dense"] == pytest.approx(figures["params_after"] / figures["params_before"])
    dense = json.loads(ask("inspect", tiny_folder, "--json")[1])
    for now, before in zip(anatomy["layers"], dense["layers"], strict=True):
        assert now["share_of_dense"] == pytest.approx(now["params"] / before["params"])
        assert now["heads"] == 2 * now["kv_heads"]
        assert before["share_of_dense"] is None


def test_perplexity_is_what_it_says(ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """exp of the mean loss over non-overlapping windows of the text as it is, by transformers' own forward."""
    from transformers import AutoModelForCausalLM

    text = "Some text, as it is.\r\n\tWith its odd  spaces and é.\n" * 9
    (tmp_path / "t.txt").write_bytes(text.encode())
    measured = json.loads(
        ask("eval", tiny_folder, "--text", tmp_path / "t.txt", "--window", 50, "--dtype", "float32", "--json")[1]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"])
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids.split(50):
            if len(window) > 1:
                total += float(model(window[None], labels=window[None]).loss) * (len(window) - 1)
                count += len(window) - 1
    assert measured["tokens"] == count
    assert measured["nll"] == pytest.approx(total / count, rel=1e-5)


def test_eval_says_what_its_windows_start_with(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A model whose tokenizer puts <s> before a text is measured with it in every window; another is not, and nothing is said."""
    opening = tmp_path / "opening"
    tiny_model(vocab_size=VOCAB).save_pretrained(opening)
    byte_tokenizer(opens=True).save_pretrained(opening)
    words = ["--text", text_file, "--window", 64, "--max-windows", 3]
    plain, opened = (json.loads(ask("eval", folder, *words, "--json")[1]) for folder in (tiny_folder, opening))
    assert (plain["windows_start_with"], opened["windows_start_with"]) == (None, "<s>")
    assert plain["tokens"] == opened["tokens"] == 3 * 63
    assert plain["nll"] != opened["nll"]
    assert "start with" not in ask("eval", tiny_folder, *words)[1]
    assert "windows start with <s>" in ask("eval", opening, *words)[1]
    assert f"windows of {opening} start with <s>" in ask("eval", tiny_folder, opening, *words)[1]


def test_several_models_make_a_table(ask: Any, tiny_folder: Path, text_file: Path) -> None:
    status, out, _ = ask("eval", tiny_folder, tiny_folder, "--text", text_file, "--window", 64, "--max-windows", 2)
    assert status == 0
    rows = [line for line in out.splitlines() if str(tiny_folder) in line]
    assert len(rows) == 2
    assert rows[0].split()[1:4] == rows[1].split()[1:4], "the same model has the same size and perplexity"
    assert all(word in out for word in ("parameters", "on disk", "perplexity", "tokens/s"))


def test_tables_for_people(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    status, out, err = ask(
        "prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *small(text_file), "--set", "step=0.1"
    )
    assert status == 0
    assert "parameters" in out
    assert "iteration 1" in err, "progress goes to stderr"
    assert re.search(r"^0 +\d+ +\d+ +\d+ +[\d,]+ +\d+\.\d%$", ask("inspect", tmp_path / "out")[1], re.MULTILINE)


def test_calibration_ids_decide_the_mask(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": torch.randint(3, 200, (8, 32), generator=generator).tolist()}))
    for name, seed in (("a", 0), ("b", 1)):
        words = ["--method", "adapt-pruner", "--calibration-ids", tmp_path / "ids.json", "--seed", seed, "--dtype", "float32"]
        assert ask("prune", tiny_folder, "-o", tmp_path / name, "--params", "70%", *words)[0] == 0
    assert read_json(tmp_path / "a" / "mask.json") == read_json(tmp_path / "b" / "mask.json")
    status, _, err = ask(
        "prune",
        tiny_folder,
        "-o",
        tmp_path / "c",
        "--params",
        "70%",
        "--calibration-ids",
        tmp_path / "ids.json",
        *small(text_file),
    )
    assert status == 2
    assert "would be ignored" in err


def test_run_and_dry_run(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"method: adapt-pruner\nmodel: {tiny_folder}\nbudget: 80%\nstages: 2\nstep: 0.1\ncalibration: {{source: {text_file}, samples: 4, length: 32}}\n"
        f"training: {{source: {text_file}, tokens: 2k, batch_tokens: 256, length: 64, lr: 1e-3}}\n"
    )
    status, out, _ = ask("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "--dry-run")
    assert status == 0
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    planned = json.loads(ask("run", tmp_path / "recipe.yaml", "--dry-run", "--set", "training.tokens=4k", "--json")[1])
    assert sum(stage["tokens"] for stage in planned["stages"]) == 4_000
    longer = ("training.tokens=40M", "training.repeat=true", "stages=1", "minutes=1")
    out = ask("run", tmp_path / "recipe.yaml", "--dry-run", *(word for key in longer for word in ("--set", key)))[1]
    assert "in total about 1 min 00 s (`minutes` ends training then; all tokens would take" in out
    status, out, err = ask("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "--set", "seed=5")
    assert status == 0
    assert f"saved {tmp_path / 'run' / 'model'}" in out
    assert "training" in err
    assert "seed: 5" in (tmp_path / "run" / "recipe.yaml").read_text()
    into = ("run", tmp_path / "recipe.yaml", "--dry-run", "-o")
    status, out, err = ask(*into, tmp_path / "run")
    assert (status, out) == (2, "")
    assert f"{tmp_path / 'run'} was started with another recipe, which differs in seed" in err, "as the run would be refused"
    assert ask(*into, tmp_path / "run", "--set", "seed=5")[0] == 0
    assert ask(*into, tmp_path / "run", "--force-recipe")[0] == 0
    assert "is not empty; name another folder" in ask(*into, tiny_folder)[2]


def test_methods_lists_rows_and_parts(ask: Any) -> None:
    out = ask("methods")[1]
    for name in (
        "adapt-pruner",
        "uniform",
        "weights.taylor",
        "activations.wanda",
        "activations.fluctuation",
        "activations.magnitude",
        "blocks.cosine",
        "blocks.block_influence",
        "allocate.adaptive",
        "schedules.wsd",
        "arXiv:2502.03460",
    ):
        assert name in out
    listed = json.loads(ask("methods", "--json")[1])
    assert "random" in listed["methods"]
    assert "blocks.loss_drop" in listed["parts"]["distance"]


def test_help_has_examples(ask: Any) -> None:
    commands = [command.name or "" for command in cli.app.registered_commands]
    for command in commands:
        status, out, _ = ask(command, "--help")
        assert status == 0
        assert f"adapt-pruner {command}" in out
        assert "<bool>" not in out, "a flag takes no value"
    status, out, _ = ask("--help")
    assert status == 0
    assert all(command in out for command in ["adapt-pruner shrink", *commands])
    assert "<bool>" not in out
    assert ask()[0] == 0


def test_the_version_names_its_commit_and_what_it_runs_with(ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = ask("--version")[1]
    root = Path(__file__).parents[1]
    asked = subprocess.run(["git", "rev-parse", "--short=9", "HEAD"], cwd=root, capture_output=True, text=True)
    of = rf", commit {asked.stdout.strip()}(-dirty)?" if asked.returncode == 0 else ""
    assert re.match(rf"adapt-pruner \d+\.\d+\.\d+, torch [\d.]+\S*, transformers [\d.]+, Python 3\.\d+\.\d+{of}, Linux", told)
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "site" / "packages")
    (tmp_path / "site" / "packages").mkdir(parents=True)
    assert provenance.commit() == "", "an installed copy of a checkout without git"
    (tmp_path / "site" / "packages" / "commit.txt").write_text("abc123def\n")
    assert provenance.commit() == "abc123def"


@pytest.mark.parametrize(
    ("installer", "origin", "command"),
    [
        ("pip", {"url": "file:///home/me/a%20clone", "dir_info": {}}, "pip install '.[eval]' in /home/me/a clone"),
        ("pip", {"url": "file:///c", "dir_info": {"editable": True}}, "pip install -e '.[eval]' in /c"),
        ("uv", {"url": "file:///c", "dir_info": {"editable": True}}, "uv pip install -e '.[eval]' in /c"),
        ("pip", None, "pip install 'adapt-pruner[eval]'"),
        (
            "pip",
            {"url": "https://github.com/a/b", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'adapt-pruner[eval] @ git+https://github.com/a/b'",
        ),
        ("pip", {"url": "file:///a.whl", "archive_info": {}}, "pip install 'adapt-pruner[eval] @ file:///a.whl'"),
    ],
)
def test_an_extra_is_installed_as_the_package_was(
    installer: str, origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before a release an index has no adapt-pruner: who has a clone is sent into it."""
    about = tmp_path / "adapt_pruner-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: adapt-pruner\nVersion: 0.1.0\n")
    (about / "INSTALLER").write_text(f"{installer}\n")
    if origin:
        (about / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert provenance.to_install("eval") == command
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    assert provenance.to_install("eval") == f"pip install '.[eval]' in {Path(__file__).parents[1]}", "not installed at all"


def test_no_other_place_says_how_an_extra_is_installed() -> None:
    root = Path(__file__).parents[1]
    places = [*root.glob("src/**/*.py"), *root.glob("docs/**/*.md"), root / "README.md"]
    naming = {str(path.relative_to(root)) for path in places if "install 'adapt-pruner[" in path.read_text(encoding="utf-8")}
    assert naming == {"src/adapt_pruner/core/system/provenance.py", "src/adapt_pruner/export/loading.py", "README.md"}
    assert "from PyPI, once released: pip install 'adapt-pruner[" in (root / "README.md").read_text(encoding="utf-8")


def test_recipes_are_listed(ask: Any) -> None:
    listed = json.loads(ask("recipes", "--json")[1])["recipes"]
    out = ask("recipes")[1]
    assert set(listed) == set(recipe.builtin())
    for name, its in listed.items():
        assert name in out
        assert its["model"] in out


# Bad input: a sentence, an exit status, nothing left behind.

BAD_PRUNE = {
    "no such model": (["nowhere", "--params", "80%"], 2, "model 'nowhere' does not exist"),
    "no such packaged model": (["smollm2-135m-instrukt", "--params", "80%"], 2, "did you mean 'smollm2-135m-instruct'"),
    "budget above the model": (["TINY", "--params", "1B"], 2, "above the"),
    "budget below what must stay": (["TINY", "--params", "1000"], 2, "the smallest possible budget is"),
    "budget that is no number": (["TINY", "--params", "much"], 2, "'much' is neither a count nor a share"),
    "share of nothing": (["TINY", "--params", "0%"], 2, "not a share"),
    "unknown method": (["TINY", "--params", "80%", "--method", "adapt-prunner"], 2, "did you mean 'adapt-pruner'"),
    "unknown key": (["TINY", "--params", "80%", "--set", "amplitud=1"], 2, "did you mean 'amplitude'"),
    "unknown inner key": (["TINY", "--params", "80%", "--set", "calibration.sampels=1"], 2, "did you mean 'samples'"),
    "unknown part": (["TINY", "--params", "80%", "--set", "metric=weights.tailor"], 2, "did you mean 'weights.taylor'"),
    "unknown option of a part": (
        ["TINY", "--params", "80%", "--set", "metric=weights.magnitude(nrom=l2)"],
        2,
        "did you mean 'norm'",
    ),
    "value out of range": (["TINY", "--params", "80%", "--set", "step=7"], 2, "less than or equal to 1"),
    "value of another kind": (["TINY", "--params", "80%", "--set", "debt=forget"], 2, "'carry' or 'reset'"),
    "key without a value": (["TINY", "--params", "80%", "--set", "step"], 2, "has no value"),
    "training in prune": (
        ["TINY", "--params", "80%", "--set", "training.source=x", "--set", "training.tokens=5"],
        2,
        "prune does not train",
    ),
    "no such text": (["TINY", "--params", "80%", "--calibration", "no.txt"], 2, "text 'no.txt' does not exist"),
    "too short a text": (
        ["TINY", "--params", "80%", "--calibration", "SHORT"],
        2,
        "gives 0 windows of 128 tokens, but 64 are asked for",
    ),
    "empty text": (["TINY", "--params", "80%", "--calibration", "EMPTY"], 2, "is empty"),
    "text that is not UTF-8": (["TINY", "--params", "80%", "--calibration", "LATIN1"], 2, "is not UTF-8"),
    "unknown device": (["TINY", "--params", "80%", "--device", "abacus"], 2, "device 'abacus'"),
    "unknown precision": (["TINY", "--params", "80%", "--dtype", "int3"], 2, "dtype"),
    "unknown option": (["TINY", "--params", "80%", "--bogus"], 2, "No such option"),
    "truncated weights": (["TRUNCATED", "--params", "80%"], 1, "are damaged"),
    "encoder-only": (["ENCODER", "--params", "80%"], 2, "not a causal language model"),
    "unknown family": (
        ["STRANGE", "--params", "80%"],
        2,
        "(known: clip, gemma3_text, llama, mistral, mobilellm, nemotron-nas, phi3, qwen2, qwen3",
    ),
    "not a model": (["FOLDER", "--params", "80%"], 2, "no config.json"),
    "weights that are not numbers": (
        ["NAN", "--params", "80%", "--calibration", "LONG", "--method", "adapt-pruner"],
        1,
        "loss on the calibration text is nan",
    ),
    "weights that write nothing": (
        ["NAN", "--params", "80%", "--calibration", "LONG"],
        1,
        "no text can be drawn from logits of nan or inf; the model's weights are damaged",
    ),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> dict[str, str]:
    base = tmp_path_factory.mktemp("things")
    found = {"TINY": tiny_folder, "LONG": text_file}
    for name, content in (("SHORT", b"too short"), ("EMPTY", b" \n"), ("LATIN1", b"caf\xe9 " * 9)):
        found[name] = base / f"{name}.txt"
        found[name].write_bytes(content)
    for name, raw in (
        ("ENCODER", {"model_type": "bert", "architectures": ["BertModel"]}),
        ("STRANGE", {"model_type": "opt", "architectures": ["OPTForCausalLM"]}),
    ):
        found[name] = base / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(raw))
    found["FOLDER"] = base / "folder"
    found["FOLDER"].mkdir()
    found["TRUNCATED"] = base / "truncated"
    found["TRUNCATED"].mkdir()
    for file in tiny_folder.iterdir():
        content = file.read_bytes()
        (found["TRUNCATED"] / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    broken = tiny_model(vocab_size=VOCAB)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(base / "nan")
    byte_tokenizer().save_pretrained(base / "nan")
    found["NAN"] = base / "nan"
    return {name: str(path) for name, path in found.items()}


def one_sentence(err: str) -> str:
    """The last line of stderr, which must be the only one about the error."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    return lines[-1]


@pytest.mark.parametrize("case", BAD_PRUNE)
def test_bad_input_to_prune(case: str, ask: Any, things: dict[str, str], tmp_path: Path) -> None:
    words, expected, said = BAD_PRUNE[case]
    status, out, err = ask("prune", *[things.get(word, word) for word in words], "-o", tmp_path / "out")
    assert said in one_sentence(err)
    assert status == expected
    assert out == ""
    assert list(tmp_path.iterdir()) == []


BAD_OTHERS = {
    "no such recipe": (["run", "no-recipe.yaml"], 2, "recipe 'no-recipe.yaml' does not exist"),
    "recipe that is not YAML": (["run", "YAML"], 2, "is not YAML"),
    "recipe without a model": (["run", "BARE"], 2, "names no model"),
    "recipe with an unknown method": (["run", "METHOD"], 2, "did you mean 'uniform'"),
    "recipe that trains on nothing": (["run", "NOTHING"], 2, "training.source is not"),
    "eval of two texts": (
        ["eval", "TINY", "--text", "a", "--text", "b"],
        2,
        "--text is given 2 times and takes one value; give it once",
    ),
    "eval without text": (["eval", "TINY"], 2, "nothing to measure; give --text"),
    "eval on self": (["eval", "TINY", "--text", "self"], 2, "its own text"),
    "eval on empty text": (["eval", "TINY", "--text", "EMPTY"], 2, "is empty"),
    "eval of damaged weights": (["eval", "NAN", "--text", "LONG"], 1, "loss on the text is nan"),
    "eval in unknown precision": (["eval", "TINY", "--text", "LONG", "--dtype", "f32"], 2, "did you mean 'float32'"),
    "inspect of nothing": (["inspect", "nowhere"], 2, "does not exist"),
    "no such command": (["prun"], 2, "No such command"),
}


@pytest.mark.parametrize("case", BAD_OTHERS)
def test_bad_input_to_the_others(case: str, ask: Any, things: dict[str, str], tmp_path: Path) -> None:
    for name, content in (
        ("YAML", "a: [1"),
        ("BARE", "budget: 80%"),
        ("METHOD", f"model: {things['TINY']}\nbudget: 80%\nmethod: unifrm"),
        ("NOTHING", f"model: {things['TINY']}\nbudget: 80%\ntraining: {{tokens: 5}}"),
    ):
        (tmp_path / name).write_text(content)
        things = things | {name: str(tmp_path / name)}
    words, expected, said = BAD_OTHERS[case]
    status, out, err = ask(*[things.get(word, word) for word in words])
    assert said in one_sentence(err)
    assert status == expected
    assert out == ""


def test_a_full_target_is_refused_before_any_work(ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("…")
    for words in (["prune", tiny_folder, "--params", "80%"], ["run", "smollm2-demo"]):
        status, _, err = ask(*words, "-o", tmp_path)
        assert (status, "exists and is not empty" in one_sentence(err)) == (2, True)
        assert "loading" not in err
    assert (tmp_path / "precious").read_text() == "…"


def test_a_full_disk(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    status, _, err = ask("prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *small(text_file), "--set", "step=0.2")
    assert status == 1
    assert "the disk is full; nothing was left there" in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_fault_is_still_a_sentence(ask: Any, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("adapt_pruner.checkpoint.load.load", broken)
    status, _, err = ask("inspect", tiny_folder)
    assert status == 1
    assert "unexpected ZeroDivisionError: of ours" in one_sentence(err)


def test_an_interrupt_that_python_drops_comes_again(ask: Any, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    class Group:  # as in regex, which transformers compiles patterns with
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def slow(*_: Any, **__: Any) -> None:
        Group()
        for _ in range(500):  # an interrupt of the main thread by another wakes no sleep
            time.sleep(0.01)
        went_on.append(True)

    went_on: list[bool] = []

    monkeypatch.setattr("adapt_pruner.checkpoint.load.load", slow)
    status, _, err = ask("inspect", tiny_folder)
    assert (status, went_on, "interrupted" in one_sentence(err)) == (1, [], True)


@pytest.mark.parametrize("when", ["training", "start"])
def test_ctrl_c(when: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A real SIGINT while it trains, and while it starts; test_resume sends them at random moments, of scoring among others."""
    (tmp_path / "recipe.yaml").write_text(
        f"method: adapt-pruner\nmodel: {tiny_folder}\nbudget: 60%\nstep: 0.0005\ncalibration: {{source: {text_file}, samples: 64, length: 64}}\n"
        if when != "training"
        else f"method: adapt-pruner\nmodel: {tiny_folder}\nbudget: 90%\nstep: 1\ncalibration: {{source: {text_file}, samples: 4, length: 32}}\n"
        f"training: {{source: {text_file}, tokens: 1M, batch_tokens: 256, length: 64}}\n"
    )
    wait_for = {"training": "stage-1-pruned", "start": "loading"}[when]
    process = subprocess.Popen(
        [*COMMAND, "run", "recipe.yaml", "-o", "run"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if wait_for in line:
            break
    while when == "training" and not log_of(tmp_path / "run", "step"):
        assert process.poll() is None, seen
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=HANGS)
    assert process.returncode == 1, seen + rest
    assert "interrupted" in one_sentence(seen + rest)
    assert out == ""
    assert not (tmp_path / "run" / "model").exists()
    assert not list(tmp_path.rglob("*.partial-*"))


def test_results_on_a_terminal_of_another_encoding(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *small(text_file)]
    monkeypatch.setattr(sys, "argv", ["adapt-pruner", *map(str, words)])
    monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    terminal.seek(0)
    assert "loss on the calibration text" in (said := terminal.read())
    assert r"\u2192" in said


LEFT_WAITING = """
import signal, threading, time
from adapt_pruner import cli, recipe
def interrupted(*_, **__):
    threading.Thread(target=threading.Event().wait).start()
    signal.raise_signal(signal.SIGINT)
recipe.methods = interrupted
cli._TO_END = 0.5
cli.program()
"""


def test_ctrl_c_when_a_thread_of_a_library_waits_for_ever() -> None:
    """Python would wait for the thread, as it does if an interrupt leaves the lock of a pool's semaphore held."""
    command = [sys.executable, "-P", "-c", LEFT_WAITING, "methods"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "interrupted" in one_sentence(done.stderr)


def test_ctrl_c_while_saving(
    ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adapt_pruner.checkpoint.save.to_json", interrupted)
    status, _, err = ask("prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *small(text_file), "--set", "step=0.2")
    assert status == 1
    assert "interrupted" in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_no_launcher_gave_silences_nothing(ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RANK alone, as a shell may have it, does not make this one of several processes."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, _, err = ask("prune", tmp_path / "none", "-o", tmp_path / "out", "--params", "80%")
    assert status == 2
    assert "\nerror: model " in err


@pytest.mark.parametrize("words", [["prune"], ["shrink", "--tokens", "10k"]])
def test_several_processes_that_no_launcher_started(
    words: list[str], ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before a model is looked for: nobody said where they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = ask(words[0], tmp_path / "none", "-o", tmp_path / "out", "--params", "80%", *words[1:])
    said = "error: WORLD_SIZE says that 2 processes were started, but not where they meet"
    assert (status, err.startswith(said)) == (2, True), err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["card", "none"], 2, "error in process 1: none is not a folder; "),
        (["compare", "none", "-o", "out", "--params", "80%", "--methods", "random", "--text", "none"], 2, ""),
    ],
)
def test_an_error_that_one_process_has_is_said_by_it_and_one_of_all_is_not(
    words: list[str], status: int, said: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None but the second process, on another machine perhaps, may lack the folder; the main process refuses `compare` itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    left, out, err = ask(*words)
    assert (left, out) == (status, "")
    assert err.startswith(said)
    assert bool(err) == bool(said), err
