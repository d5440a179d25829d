"""Runs that take tokens away: what is saved, how it goes on, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.report import charts
from adapt_pruner.report.figures import figures_of
from adapt_pruner.report.page import page
from adapt_pruner.report.record import read_record
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import results
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.run.start import begin, prepare
from adapt_pruner.run.training import Trainer
from conftest import as_dicts, assert_same_model, break_off, byte_tokenizer, read_json, suited, tiny_model
from strangers import ask_a_stranger
from test_pipeline import Heard
from test_vocabulary import byte_level

STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (kind.from_pretrained(sys.argv[1], trust_remote_code=True) for kind in (AutoTokenizer, AutoModelForCausalLM))
text = "Zoë said: for x in range(3): 汉字 🙂"
ids = tokenizer(text, return_tensors="pt")["input_ids"]
written = model.generate(ids, max_new_tokens=5, do_sample=False)
print(json.dumps({
    "back": tokenizer.decode(ids[0], skip_special_tokens=True) == text, "written": written[0, -5:].tolist(),
    "tokens": len(tokenizer), "rows": [model.get_input_embeddings().num_embeddings, model.lm_head.out_features, model.config.vocab_size],
    "ends": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id],
    "starts": [tokenizer.bos_token_id, model.config.bos_token_id],
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)[0],
}))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-words"
    tokenizer = byte_level()
    tiny_model(
        vocab_size=len(tokenizer) + 11, tie_word_embeddings=request.param, bos_token_id=700, pad_token_id=2
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    return suited({
        "model": str(folder), "budget": "60%", "method": "magnitude-all", "dtype": "float32",
        "vocabulary": {"source": str(text), "keep": 400},
    } | changes)  # fmt: skip


def test_a_model_with_fewer_tokens(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Tokens go first and count towards the budget; stock transformers reads the result; one mask says all; a second run goes on."""
    outcome = prune(recipe_of(folder, text_file), tmp_path / "small")
    figures = outcome.figures
    dense = load(str(folder))
    cost = next(axis.cost for axis in families.axes(dense.model) if axis.kind == "vocabulary")
    assert (figures["vocabulary_before"], figures["vocabulary_after"]) == (713, 400)
    assert figures["params_before"] == count_parameters(dense.model)
    assert figures["params_after_vocabulary"] == figures["params_before"] - 313 * cost
    assert figures["params_after"] <= 0.6 * figures["params_before"]

    mask = Mask.from_json(read_json(tmp_path / "small" / "mask.json"))
    assert int(mask["vocabulary"].sum()) == 400
    cut(dense.model, families.axes(dense.model), mask)
    again = load(str(tmp_path / "small"))
    ids = again.tokenizer("Line 7: the quick brown fox", return_tensors="pt")["input_ids"]
    assert torch.equal(dense.model(ids).logits, again.model(ids).logits)
    assert again.dense_params == figures["params_before"]

    told = json.loads(ask_a_stranger(STRANGER, tmp_path / "small", folder=tmp_path))
    assert told["back"]
    assert told["tokens"] == 400
    assert told["rows"] == [400] * 3
    assert told["ends"] == [2, 2, 2]
    assert told["starts"] == [told["chat"]] * 2
    assert again.tokenizer.convert_ids_to_tokens(told["chat"]) == "<begin>"
    assert max(told["written"]) < 400

    prune(
        recipe_of(tmp_path / "small", text_file, budget="95%", vocabulary={"source": str(text_file), "keep": 350}),
        tmp_path / "less",
    )
    whole = Mask.from_json(read_json(tmp_path / "less" / "mask.json"))
    assert whole["vocabulary"].numel() == 713
    assert int(whole["vocabulary"].sum()) == len(load(str(tmp_path / "less")).tokenizer) == 350
    assert bool(mask["vocabulary"][whole["vocabulary"]].all())


def test_tokens_alone_can_go(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """With the whole model as the budget nothing else is pruned; min_uses keeps what is used so often."""
    asked = {"source": str(text_file), "min_uses": 50}
    outcome = prune(recipe_of(folder, text_file, budget="100%", vocabulary=asked), tmp_path / "small")
    assert outcome.history == []
    assert list(outcome.mask) == ["vocabulary"]
    tokenizer = load(str(folder)).tokenizer
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    assert bool(outcome.mask["vocabulary"][ids.bincount(minlength=713) >= 50].all())


@pytest.mark.parametrize("method", ["magnitude-all", "best"])
def test_a_run_goes_on_with_its_tokens(
    method: str, folder: Path, text_file: Path, tmp_path: Path, events: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are even over what is left to prune once tokens went; a stopped run ends as one that was not, and takes none twice."""
    heard, listen = events
    recipe = recipe_of(
        folder, text_file, method=method, stages=3, step=0.1,
        calibration={"source": str(text_file), "samples": 4, "length": 32, "self_generated": 8},
        training={"source": str(text_file), "tokens": 2_000, "batch_tokens": 256, "length": 64, "lr": 3e-3},
        evaluation={"source": str(text_file), "window": 64, "max_windows": 3},
    )  # fmt: skip
    whole = run(recipe, tmp_path / "whole", listen=as_dicts(listen))
    targets = [event["target"] for event in heard if event["event"] == "cut"]
    begin, end = whole.figures["params_after_vocabulary"], int(whole.figures["params_before"] * 0.6)
    assert set(targets) == {begin - (begin - end) // 3, begin - (begin - end) * 2 // 3, end}
    assert len(whole.figures["bits_per_byte"]) == 4
    assert [event["tokens"] for event in heard if event["event"] == "vocabulary"] == [400]

    kept = Trainer.begin_stage

    def stop(self: Trainer) -> None:
        if self._work.state.stage == 2:
            raise KeyboardInterrupt
        kept(self)

    monkeypatch.setattr(Trainer, "begin_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    heard.clear()
    outcome = run(recipe, tmp_path / "run", listen=as_dicts(listen))
    assert outcome is not None
    assert [event["event"] for event in heard if event["event"] in ("vocabulary", "resumed")] == ["resumed"]
    assert outcome.mask == whole.mask
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    texts = [(tmp_path / name / "model" / "tokenizer.json").read_text() for name in ("whole", "run")]
    assert texts[0] == texts[1]


def test_a_run_keeps_to_the_tokens_it_began_with(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"source": str(text_file), "tokens": 500, "batch_tokens": 256, "length": 64}
    monkeypatch.setattr(results, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(folder, text_file, training=training), tmp_path / "run")
    other = recipe_of(folder, text_file, training=training, vocabulary={"source": str(text_file), "keep": 450})
    with pytest.raises(UsageError, match=r"differs in vocabulary\.keep"):
        run(other, tmp_path / "run")
    with pytest.raises(UsageError, match="has been cut already, and the recipe now asks for another one"):
        run(other, tmp_path / "run", force_recipe=True)


def test_a_dry_run_counts_them(folder: Path, text_file: Path) -> None:
    """On paper too, where the config is all there is."""
    told = dry_run(recipe_of(folder, text_file, budget="95%"))
    assert told["params_before"] == count_parameters(load(str(folder)).model)
    assert told["stages"][0]["iterations"] == 0, "the tokens are more than a twentieth"


def test_a_dry_run_on_paper_counts_them(folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    told = dry_run(recipe_of(tmp_path, text_file, budget="95%"))
    assert told["params_before"] == count_parameters(load(str(folder)).model)
    assert told["stages"][0]["iterations"] == 0


def test_the_dense_model_teaches_the_tokens_that_stay(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """By name or by default, in one go or continued: the teacher is the dense model without the same tokens."""
    training = {"source": str(text_file), "tokens": 1_000, "batch_tokens": 256, "length": 64, "objective": "objectives.distil"}
    asked = recipe_of(folder, text_file, training=training, checkpoint_minutes=0)
    outcome = run(asked, tmp_path / "whole")
    break_off(asked, tmp_path / "run", kind="step", nth=2)
    run(asked, tmp_path / "run")
    assert_same_model(tmp_path / "whole", tmp_path / "run")
    run(recipe_of(folder, text_file, training=training | {"teacher": str(folder)}), tmp_path / "named")
    assert_same_model(tmp_path / "whole", tmp_path / "named")

    work = begin(asked, listen=lambda event: None)
    prepare(work)
    dense, keep = load(str(folder)).model, outcome.mask["vocabulary"]
    ids = torch.arange(3, 40)[None]
    told = work.data.teacher(ids).logits.log_softmax(-1)
    before = torch.nonzero(keep).flatten()[ids]
    assert torch.allclose(told, dense(before).logits[..., keep].log_softmax(-1), atol=1e-5)


def test_a_teacher_of_other_tokens_is_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    training = {"source": str(text_file), "tokens": 500, "batch_tokens": 256, "length": 64, "objective": "objectives.distil"}
    other = tmp_path / "other"
    tiny_model(vocab_size=259).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(UsageError, match=r"\(259 tokens\) and .* \(400\) have different tokenizers"):
        prune(recipe_of(folder, text_file, training=training | {"teacher": str(other)}), tmp_path / "out")


def test_the_model_writes_its_calibration_text_with_the_tokens_that_stay(folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe_of(
        folder,
        text_file,
        method="adapt-pruner",
        calibration={"samples": 4, "length": 16},
        budget="50%",
        checkpoint_minutes=0,
        step=0.2,
    )
    assert asked.calibration.source == "self"
    run(asked, tmp_path / "whole")
    written = read_json(next((tmp_path / "whole").rglob("calibration_self.json")))["input_ids"]
    assert {max(row) < 400 for row in written} == {True}
    break_off(asked, tmp_path / "run", kind="cut", nth=1)
    run(asked, tmp_path / "run")
    assert_same_model(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": {"keep": 400}}, r"vocabulary names no text; set vocabulary\.source"),
        ({"vocabulary": {"source": "x.txt"}}, "needs either keep or min_uses; set one of them"),
        ({"vocabulary": {"source": "x.txt", "keep": 400, "min_uses": 3}}, "needs either keep or min_uses; set one of them"),
        ({"vocabulary": {"source": "x.txt", "kep": 400}}, "did you mean 'keep'"),
        ({"calibration": {"ids": "ids.json"}}, r"calibration\.ids are token ids of the vocabulary before it is pruned"),
        ({"vocabulary": {"source": "missing.txt", "keep": 400}}, "missing.txt"),
        ({"vocabulary": {"source": "python-docs", "keep": 4000}}, r"keep 4,000 is not below the 713 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prune(recipe_of(folder, text_file, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_does_not_call_a_model_dense_that_has_lost_tokens(folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe_of(folder, text_file, evaluation={"source": str(text_file), "window": 64, "max_windows": 4})
    run(asked, tmp_path / "run")
    record = read_record(tmp_path / "run")
    figures = figures_of(record)
    rows = {row.name: row for row in figures.rows}
    assert (rows["parameters"].begun, rows["in decoder layers"].begun) == ("dense", "dense")
    assert (rows["perplexity"].begun, rows["bits per byte"].begun, figures.begun) == ("at the start",) * 3
    assert "at the start" in page(record)
    line = charts.perplexities(figures)
    assert line is not None
    assert line.series[0].labels[-1] == "at the start"

    # of a run that was stopped, from its newest checkpoint: tokens are no part of the layers
    known = dict(record.figures)
    assert known.pop("decoder_params_after") == rows["in decoder layers"].now
    stopped = replace(record, pruning={**record.pruning, "figures": known})
    assert {row.name: row for row in figures_of(stopped).rows}["in decoder layers"].now == rows["in decoder layers"].now
