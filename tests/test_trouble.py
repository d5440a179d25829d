"""What a newcomer gets wrong with recipes, models and places: one sentence that names it, and nothing left behind."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapt_pruner.checkpoint.load import load, load_shapes
from adapt_pruner.compare.request import Request
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, read
from conftest import VOCAB, byte_tokenizer, suited, tiny_model
from test_cli import ask, one_sentence
from test_compare import pruned_here
from test_packaged import write_gguf

__all__ = ["ask", "pruned_here"]  # fixtures

RECIPES = {
    "a key given twice": (b"model: m\nbudget: 80%\nbudget: 60%\n", "line 3: budget is given twice; leave one of them out"),
    "an inner key given twice": (b"training:\n  lr: 1\n  lr: 2\n", "line 3: lr is given twice"),
    "no YAML": (b"model: m\nbudget: [1,\n", "is not YAML: line 3, .*correct the line"),
    "a tag": (b"model: !!python/name:os.system\n", "is not YAML: line 1, .*python/name:os.system.*correct the line"),
    "another encoding": ("model: m\n".encode("utf-16"), "is not text in UTF-8 .*save it as UTF-8"),
    "a share without %": (
        b"model: m\nbudget: 0.8\n",
        "budget '0.8' is neither a count nor a share; write it like 110M, 110_000_000, 80% or '80% of decoder'",
    ),
    "a negative count": (b"model: m\ntraining: {tokens: -1}\n", "recipe key 'training.tokens': -1 is not a count"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_file(case: str, tmp_path: Path) -> None:
    content, wanted = RECIPES[case]
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=wanted):
        read(tmp_path / "r.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name a YAML file$"):
        read(tmp_path)


def test_keys_that_stand_once_are_read() -> None:
    """No budget is none, the same key in two tables is not the same key, and a list may be a key's value."""
    assert read({"budget": None}).budget == ""
    assert read({"budget": 5_000_000}) == read({"budget": "5000000"})
    assert read({}, overrides=["calibration.length=64", "training.length=64"], shared=True).training.length == 64
    assert read({}, overrides=["calibration=\n  length: 64\n  samples: 8"]).calibration.samples == 8
    with pytest.raises(ValueError, match="nor a share"):
        Recipe(budget="eighty")


TWICE = {
    "two of --set": (["--set", "step=0.1", "--set", "step=0.2"], "--set step is given twice"),
    "an option and --set": (
        ["--method", "flap", "--set", "method=random"],
        "method is set by its own option and by --set",
    ),
    "--params and --set": (["--set", "budget=70%"], "budget is set by its own option and by --set"),
    "samples": (["--calibration-samples", "4", "--set", "calibration.samples=8"], "calibration.samples is set by its own option"),
}


@pytest.mark.parametrize("case", TWICE)
def test_what_is_said_twice_is_refused(case: str, ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    words, wanted = TWICE[case]
    status, _, err = ask("prune", tiny_folder, "-o", tmp_path / "out", "--params", "80%", *words)
    assert (status, wanted in one_sentence(err)) == (2, True), err
    assert "loading" not in err


@pytest.mark.parametrize("written", ["0.8", "0%", "101%", "NaN%", "-1", "1e99"])
def test_a_budget_is_refused_before_a_model_is_loaded(written: str, ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    status, _, err = ask("prune", tiny_folder, "-o", tmp_path / "out", f"--params={written}")
    wanted = f"budget {written!r} is {'not a share of' if '%' in written else 'neither a count nor a share'}"
    assert (status, wanted in one_sentence(err), "loading" in err) == (2, True, False), err


PLACES = {
    "prune": ["prune", "TINY", "--params", "80%", "-o"],
    "run": ["run", "smollm2-demo", "--set", "model=TINY", "-o"],
    "compare": ["compare", "TINY", "--methods", "magnitude-all", "--params", "80%", "--text", "LONG", "-o"],
    "export": ["export", "TINY", "--to", "padded", "-o"],
}


@pytest.mark.parametrize("command", PLACES)
def test_a_place_in_a_file_is_refused_before_any_work(
    command: str, ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = [word.replace("TINY", str(tiny_folder)).replace("LONG", str(text_file)) for word in PLACES[command]]
    status, _, err = ask(*words, tmp_path / "notes.txt" / "x")
    assert status == 2
    assert "notes.txt is a file, so" in one_sentence(err)
    assert "iteration" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_gguf_file_in_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("adapt_pruner.export.gguf")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes.txt is a file, so .*m.gguf cannot be made in it"):
        gguf.write(load(str(tiny_folder)), tmp_path / "notes.txt" / "m.gguf")


def test_a_run_does_not_begin_in_a_comparison(
    ask: Any, pruned_here: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["--methods", "magnitude-all", "--params", "80%", "--text", text_file, "--max-windows", 1, "--draws", 1]
    assert ask("compare", tiny_folder, *words, "-o", tmp_path / "c")[0] == 0
    assert len(pruned_here) == 1
    before = sorted(tmp_path.rglob("*"))
    status, _, err = ask("run", "smollm2-demo", "--set", f"model={tiny_folder}", "-o", tmp_path / "c")
    assert (status, "exists and is not empty" in one_sentence(err)) == (2, True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            ["latency=0.7x"],
            "compare prunes to the sizes of --params, and the recipe of magnitude sets a latency; leave latency out",
        ),
    ],
)
def test_what_every_cell_would_fail_by_is_refused_before_the_first(given: list[str], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        Request(model="m", methods=("magnitude",), params=("80%",), texts=("t.txt",), overrides=tuple(given)).checked()


def test_numbers_of_tokens_and_a_vocabulary_of_fewer_do_not_go_together() -> None:
    asked = Request(
        model="m", methods=("magnitude",), params=("80%",), texts=("t.txt",), calibration_ids=("ids.json",),
        overrides=("vocabulary.source=a.txt", "vocabulary.keep=300"),
    )  # fmt: skip
    with pytest.raises(UsageError, match="calibration.ids are token ids of the vocabulary before it is pruned; name a text"):
        asked.checked()


def test_a_comparison_is_told_its_text_once() -> None:
    asked = Request(
        model="m", methods=("flap",), params=("80%",), texts=("t",), calibration="a", overrides=("calibration.source=b",)
    )
    with pytest.raises(UsageError, match="calibration.source is set by its own option and by --set; leave one of them out"):
        asked.checked()


def test_the_folder_of_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("budget: 80%")
    with pytest.raises(
        UsageError, match="it is the folder of a run that has no result yet; let the run end, or name one of its checkpoints$"
    ):
        load(str(tmp_path / "run"))
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(UsageError, match=r"it is the folder of a run; name its result, .*/run/model$"):
        load(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"method": "shortgpt"}, "axes names layers"),
        ({"method": "slicegpt"}, "reduce slice changes their width or number"),
        (
            {"method": "sheared", "reduce": "hard_concrete(residual=24)", "axes": ["neurons"]},
            "reduce hard_concrete(residual=24) changes their width or number",
        ),
    ],
)
def test_hidden_states_that_will_differ_in_number_or_width_are_not_compared(
    method: dict[str, Any], why: str, ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Before anything is pruned, and not when training begins."""
    (tmp_path / "r.yaml").write_text(suited({
        "model": str(tiny_folder), "budget": "80%", "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "training": {"source": str(text_file), "tokens": 1000, "length": 32, "objective": "objectives.distil(hidden=0.1)"}, **method,
    }).to_yaml())  # fmt: skip
    status, _, said = ask("run", tmp_path / "r.yaml", "-o", tmp_path / "run")
    assert status == 2
    assert f"layer by layer, but {why}; leave out hidden" in one_sentence(said)
    assert "scoring" not in said


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder with a tiny model, to be spoilt."""
    tiny_model(vocab_size=VOCAB).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_a_quantised_model_is_called_one(spoilt: Path) -> None:
    change(spoilt, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        UsageError, match=r"is quantised \(gptq\), and only unquantised weights can be loaded; name the model it was made from$"
    ):
        load(str(spoilt))


def test_a_weight_that_does_not_fit_is_named(spoilt: Path) -> None:
    state = load_file(spoilt / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(9, 48)
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"'model.layers.1.mlp.up_proj.weight' is 9 × 48 in the file and 40 × 48 in config.json; get the"
    ):
        load(str(spoilt))


def test_a_config_that_is_wrong_says_what_is(spoilt: Path) -> None:
    change(spoilt, hidden_size="abc")
    with pytest.raises(UsageError, match="cannot be loaded: .*'hidden_size'.*abc"):
        load(str(spoilt))


def test_a_model_without_a_file_of_a_tokenizer(spoilt: Path) -> None:
    for file in spoilt.glob("token*"):
        file.unlink()
    with pytest.raises(UsageError, match=r"no usable tokenizer \(there is no tokenizer file\); add tokenizer.json"):
        load(str(spoilt))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_gguf_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model(vocab_size=VOCAB + 1))
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=r"m.gguf is damaged or cut off \(.*\); get the file again$"):
        load(str(tmp_path / "m.gguf"))


def test_weights_that_are_not_numbers_give_no_answer(ask: Any, spoilt: Path) -> None:
    state = load_file(spoilt / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    for dtype, remedy in (("float32", "float32; get its files again"), ("bfloat16", "bfloat16; set dtype to float32")):
        status, out, err = ask("chat", spoilt, "hello", "--max-new-tokens", 4, "--dtype", dtype)
        assert (status, out) == (1, "")
        assert f"logits of nan or inf; the model's weights are damaged or overflow in {remedy}" in one_sentence(err)


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    from adapt_pruner.data.sources import documents

    (tmp_path / "wide.txt").write_text("some text", encoding="utf-16")
    with pytest.raises(UsageError, match="iconv -f utf-16 -t utf-8"):
        list(documents(str(tmp_path / "wide.txt")))
    for nothing in ("", " ", {"a.txt": 1, "": 2}):
        with pytest.raises(UsageError, match="name is empty, perhaps because a shell variable is not set"):
            read({"calibration": {"source": nothing}})
    with pytest.raises(UsageError, match="'hub:' names no data set; write it like hub:NAME"):
        list(documents("hub:"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "nope"), ("text_config", {"hidden_size": 3}), ("num_key_value_heads", 0), ("num_attention_heads", 0), ("head_dim", 0),
     ("pad_token_id", 9999), ("rope_parameters", {"rope_type": "nope", "rope_theta": 1e4})],
)  # fmt: skip
def test_a_key_of_the_config_is_blamed_and_not_the_weights(key: str, value: Any, spoilt: Path) -> None:
    change(spoilt, **{key: value})
    wanted = rf"cannot be (built|loaded): {key} is {re.escape(repr(value))} in its config.json"
    for loaded in (load, load_shapes, partial(load, fresh=0)):
        with pytest.raises(UsageError, match=wanted) as refused:
            loaded(str(spoilt))
        assert "weights" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_stored_as_integers_are_refused(key: str, dtype: torch.dtype, spoilt: Path) -> None:
    state = load_file(spoilt / "model.safetensors")
    state[key] = state[key].to(dtype)
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=rf"{key} is stored as (I8|I64|BOOL|U8), and its config.json has no quantization_config; name"
    ):
        load(str(spoilt))
