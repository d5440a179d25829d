"""Models that read pictures: what is learnt, from which files, how well is retrieved, and the ordinary commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset, Image
from typer.testing import CliRunner

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.cli import app
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.data.contrastive import Contrastive, _recalls
from adapt_pruner.data.pictures import pairs
from adapt_pruner.errors import UsageError
from adapt_pruner.score import calibrate, weights
from conftest import VOCAB, printed, read_json
from test_towers import LAYOUTS, tiny_processor, tiny_towers, unequal

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])


def batch_of(task: Contrastive, source: Path, *, pairs: int = 16) -> torch.Tensor:
    return task.held_out(tiny_processor(), source=str(source), window=pairs, max_windows=1)[str(source)][0]


def inputs(source: Path, number: int) -> Any:
    """The first pairs of a folder as the stock processor gives them to a model."""
    some = pairs(str(source))[:number]
    given = tiny_processor()(
        text=[pair.text for pair in some], images=[pair.open() for pair in some], padding="max_length", return_tensors="pt"
    )
    return {name: given[name] for name in ("input_ids", "pixel_values")}  # SigLIP learnt without a mask over its padding


@every_layout
def test_the_loss_is_that_of_the_stock_class(layout: tuple[str, str], shown: Path) -> None:
    """In float32, with and without gradients; 70 pairs go in two passes, and are told apart together all the same."""
    model, task = tiny_towers(layout, vocab_size=VOCAB), Contrastive()
    batch = batch_of(task, shown, pairs=70)
    assert batch.shape == (48, 26)
    expected = model(**inputs(shown, 48), return_loss=True).loss.detach()
    assert float(task.loss(model, batch).detach()) / 48 == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        assert float(task.loss(model, torch.cat([batch, batch]))) > 96 * float(expected), "twice as many to tell apart"
    some = torch.zeros_like(batch, dtype=torch.bool)
    some[:5] = True
    assert task.num_predicted([batch], some) == 5
    expected = model(**inputs(shown, 5), return_loss=True).loss.detach()
    assert float(task.loss(model, batch, predicted=some).detach()) / 5 == pytest.approx(float(expected), rel=1e-5)


def test_recalls_are_those_of_sorted_similarities() -> None:
    """Captions in any order, two to a picture; a model that makes the same of everything finds nothing."""
    generator = torch.Generator().manual_seed(0)
    pictures = F.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    numbers = torch.arange(20).repeat_interleave(2)[torch.randperm(40, generator=generator)]
    texts = F.normalize(pictures[numbers] + 0.6 * torch.randn(40, 8, generator=generator), dim=-1)
    found, similar = _recalls(texts, pictures[numbers], numbers + 7), texts @ pictures.T
    for k in (1, 5, 10):
        to_picture = (similar.topk(k, dim=1).indices == numbers[:, None]).any(1).float().mean()
        to_text = (numbers[similar.topk(k, dim=0).indices] == torch.arange(20)).any(0).float().mean()
        assert float(found[f"text→image R@{k}"]) == pytest.approx(float(to_picture))
        assert float(found[f"image→text R@{k}"]) == pytest.approx(float(to_text))
    assert not any(map(float, _recalls(torch.ones(40, 8), torch.ones(40, 8), numbers).values()))


def test_classes_are_told_by_their_names(shown: Path) -> None:
    """The share that the stock class gets right with the mean of the same words, and nothing for pictures of no class."""
    model, task = tiny_towers(vocab_size=VOCAB), Contrastive()
    batch = batch_of(task, shown, pairs=48)
    given = inputs(shown, 48)
    words = [
        template.format(name) for name in ("circle", "square") for template in ("a photo of a {}.", "a picture of a {}.", "{}")
    ]
    with torch.no_grad():
        ids = tiny_processor().tokenizer(words, padding="max_length", return_tensors="pt")["input_ids"]
        names = F.normalize(F.normalize(model.get_text_features(ids).pooler_output, dim=-1).view(2, 3, -1).mean(1), dim=-1)
        seen = F.normalize(model.get_image_features(given["pixel_values"]).pooler_output, dim=-1)
        labels = torch.tensor([pair.label == "square" for pair in pairs(str(shown))]).long()
        right = int(((seen @ names.T).argmax(1) == labels).sum())
        assert float(task.judged(model, batch)["zero-shot accuracy"]) == pytest.approx(right)
        batch[:, 1] = 0
        assert "zero-shot accuracy" not in task.judged(model, batch)


def test_pairs_come_from_any_of_the_forms(shown: Path, tmp_path: Path) -> None:
    dense = [(pair.text, pair.label) for pair in pairs(str(shown))]
    (coco := tmp_path / "annotations").mkdir()
    shutil.copytree(shown, tmp_path / "val2017")
    names = sorted(path.name for path in shown.glob("*.png"))
    rows = {
        "images": [{"id": 100 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": 100 + number, "caption": text} for number, (text, _) in enumerate(dense)],
    }
    (coco / "captions_val2017.json").write_text(json.dumps(rows), encoding="utf-8")
    found = pairs(str(coco / "captions_val2017.json"))
    assert [pair.text for pair in found] == [text for text, _ in dense]
    assert found[3].open().tobytes() == pairs(str(shown))[3].open().tobytes()
    table = Dataset.from_dict({
        "image": [str(shown / name) for name in names], "text": [text for text, _ in dense], "label": [label for _, label in dense],
    }).cast_column("image", Image())  # fmt: skip
    table.save_to_disk(str(tmp_path / "saved"))
    found = pairs(str(tmp_path / "saved"))
    assert [(pair.text, pair.label) for pair in found] == dense
    assert found[3].open().convert("RGB").tobytes() == pairs(str(shown))[3].open().tobytes()
    train, held = pairs(f"{shown}#train"), pairs(f"{shown}#heldout")
    assert len(train) + len(held) == len(dense)
    assert not {pair.name for pair in train} & {pair.name for pair in held}


def test_what_is_no_set_of_pairs_is_refused(shown: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n', encoding="utf-8")
    for spec, said in (
        (str(tmp_path), "line 1, is no pair"),
        (str(tmp_path / "none"), "holds no pictures with captions"),
        (f"{shown}#half", "has no part 'half'"),
    ):
        with pytest.raises(UsageError, match=said):
            pairs(spec)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"a\.png cannot be opened"):
        pairs(str(tmp_path))[0].open()
    with pytest.raises(UsageError, match="write model_max_length into its tokenizer_config.json"):
        Contrastive().rows(tiny_processor(10**30), str(shown), length=20, tokens=100, seed=0)
    with pytest.raises(UsageError, match="set training.length to 26"):
        Contrastive().rows(tiny_processor(), str(shown), length=20, tokens=100, seed=0)


@every_layout
def test_taylor_is_of_the_loss_over_pairs(layout: tuple[str, str], shown: Path) -> None:
    """Gradients of all weights of both towers in whole passes, since the pairs of a batch are told apart together."""
    model, task = tiny_towers(layout, vocab_size=VOCAB), Contrastive()
    batch, axes = batch_of(task, shown), families.axes(model)
    found, loss = calibrate.score(model, axes, [batch], metrics=[weights.taylor], task=task, dtype="float32")
    expected = task.loss(model, batch) / 16
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for tower in ("text", "vision"):
        mlp = model.get_submodule(f"{tower}_model.encoder.layers.1.mlp")
        worth = sum((w * w.grad).detach().abs().sum(d) for w, d in ((mlp.fc1.weight, 1), (mlp.fc2.weight, 0)))
        assert torch.allclose(found[f"{tower}.layers.1.neurons"], worth, rtol=1e-3, atol=1e-6)


def test_the_merit_is_the_mean_recall_and_needs_one_tower_again(shown: Path) -> None:
    model, task = tiny_towers(vocab_size=VOCAB), Contrastive()
    batches = task.calibration(None, tiny_processor(), source=str(shown), samples=48, seed=0)(1)
    axes = families.axes(model)
    shut = Mask(
        {axis.name: torch.arange(axis.size) > 1 for axis in axes if axis.name.startswith("vision.") and axis.kind == "neurons"}
    )
    with torch.no_grad():
        text = task.observed(model, batches, "text.")
        with gated(model, axes, shut):
            found = task.merit({"text.": text, "vision.": task.observed(model, batches, "vision.")}, batches)
            whole = task.judged(model, torch.cat(batches))
    recalls = [float(value) / 48 for name, value in whole.items() if "R@" in name]
    assert found == pytest.approx(sum(recalls) / 6, abs=1e-6)


def test_a_model_is_pruned_measured_and_shown_by_the_ordinary_commands(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    """Uniform at 70 %: the parameters, the card, the anatomy by tower and the retrieval."""
    small = tmp_path / "small"
    done = printed("prune", clip_folder, "-o", small, "--params", "70%", "--method", "uniform", "--calibration", shown, "--set",
                   "calibration.samples=32", "--set", "step=0.3")  # fmt: skip
    assert f"eval {clip_folder} {small} --text PICTURES" in done.replace("\n", " ")
    assert "chat" not in done
    assert "python-docs" not in done
    loaded = load(str(small), any_task=True)
    assert sum(weight.numel() for weight in loaded.model.parameters()) <= 0.7 * 95385
    assert {name.partition(".")[0] for name in loaded.mask or ()} == {"text", "vision"}
    card = (small / "README.md").read_text(encoding="utf-8")
    for words in ("vision tower: MLP neurons a layer", "AutoProcessor", "zero-shot-image-classification", "--text PICTURES"):
        assert words in card
    assert "AutoModelForCausalLM" not in card
    assert "vision 3" in printed("inspect", small)
    measured = ap.evaluate(str(small), text=shown, window=48)
    assert measured.tokens == 48
    assert measured.judged.keys() >= {"text→image R@1", "image→text R@10", "zero-shot accuracy"}
    assert "text→image R@10" in printed("eval", small, "--text", shown)


@pytest.mark.parametrize("method", ["random", "magnitude-all"])
def test_methods_without_text_need_no_pictures(method: str, clip_folder: Path, tmp_path: Path) -> None:
    result = ap.prune(str(clip_folder), tmp_path / "small", params="70%", method=method)
    assert result.figures["params_after"] <= 0.7 * 95385


def test_a_run_trains_on_pairs_between_its_cuts(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "method": "llm-pruner", "chooser": "allocate.uniform", "model": str(clip_folder), "budget": "60%", "stages": 2,
        "calibration": {"source": str(shown), "samples": 32},
        "training": {"source": str(shown), "length": 26, "tokens": 10_000, "batch_tokens": 1248, "lr": 0.003},
        "evaluation": {"source": str(shown), "window": 48},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    printed("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    figures = read_json(tmp_path / "run" / "model" / "pruning.json")["figures"]
    assert [row["stage"] for row in figures["judged"]] == [0, 1, 2]
    assert figures["params_after"] <= 0.6 * 95385 < figures["params_before"]
    assert figures["judged"][2]["text→image R@10"] > figures["judged"][0]["text→image R@10"], "it learns"
    assert "text→image R@10" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    planned = printed("run", tmp_path / "recipe.yaml", "-o", tmp_path / "other", "--dry-run")
    assert "in total about" in planned


def test_each_tower_is_exported_as_a_graph(shown: Path, tmp_path: Path) -> None:
    """With layers that differ from the other tower's; cosines of pictures and captions are those of the model, at another batch size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_towers(vocab_size=VOCAB)
    axes = families.axes(model)
    one = {
        axis.name: torch.arange(axis.size) == 1 for axis in axes if axis.kind == "layers"
    }  # a graph of more takes long to make
    cut(model, axes, Mask(unequal(axes).kept | one))
    save(model, tiny_processor(), tmp_path / "model", dtype=torch.float32)
    said = printed("export", tmp_path / "model", "--to", "onnx", "-o", tmp_path / "graphs")
    assert "verify" not in said
    given = inputs(shown, 5)
    embeds = [
        torch.from_numpy(
            onnxruntime.InferenceSession(tmp_path / "graphs" / f"{tower}_model.onnx").run(None, {name: given[name].numpy()})[0]
        )
        for tower, name in (("text", "input_ids"), ("vision", "pixel_values"))
    ]
    with torch.no_grad():
        output = model(**given)
    assert torch.allclose(embeds[0] @ embeds[1].T, output.text_embeds @ output.image_embeds.T, atol=1e-4)


def test_commands_for_language_models_refuse_in_a_sentence(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    for words in (
        ("export", clip_folder, "--to", "gguf", "-o", tmp_path / "x.gguf"),
        ("export", clip_folder, "--to", "uniform", "-o", tmp_path / "x"),
        ("chat", clip_folder, "hello"),
        ("eval", clip_folder, "--text", shown, "--chat", "2"),
        ("compare", clip_folder, "--methods", "random", "--params", "80%", "--text", shown, "-o", tmp_path / "compared"),
        ("verify", clip_folder, tmp_path, "--text", shown),
    ):
        called = CliRunner().invoke(app, [str(word) for word in words])
        assert called.exit_code != 0
        assert isinstance(called.exception, UsageError), words
        assert "which reads pictures too, and this works with language models alone" in str(called.exception), words


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "adapt-pruner"}, "does not work with a model of two towers"),
        ({"method": "uniform", "calibration.source": "python-docs"}, "holds no pictures with captions"),
        ({"method": "uniform", "task": "causal_lm", "repair": "closed_form.least_squares"}, "repair=closed_form.least_squares"),
        ({"method": "uniform", "calibration.samples": "500"}, "fewer than calibration.samples 500"),
    ],
)  # fmt: skip
def test_what_needs_one_stack_of_layers_is_refused(
    clip_folder: Path, shown: Path, tmp_path: Path, keys: dict[str, str], said: str
) -> None:
    settings = {"calibration.source": str(shown)} | {key: value for key, value in keys.items() if key != "method"}
    with pytest.raises(UsageError) as refused:
        ap.prune(str(clip_folder), tmp_path / "small", params="70%", method=keys["method"], settings=settings)
    assert said in str(refused.value)
    assert not (tmp_path / "small").exists()
