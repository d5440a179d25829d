"""Distillation of models of two towers: each term by hand, and in a run."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.data.contrastive import Contrastive
from adapt_pruner.errors import UsageError
from adapt_pruner.report.with_card import run
from adapt_pruner.train.pairs import distil_towers
from conftest import VOCAB, assert_refused, log_of, suited
from test_contrastive import batch_of, inputs
from test_removal import keys
from test_towers import tiny_towers

OFF = {"contrast": 0.0, "similarity": 0.0, "output": 0.0, "hidden": 0.0}


def test_each_term_is_what_it_says(shown: Path) -> None:
    """Against the stock outputs; a vision layer is gone, so that layers 1 to 3 stand for 1, 3 and 4."""
    teacher, student, task = tiny_towers(vocab_size=VOCAB).requires_grad_(False), tiny_towers(vocab_size=VOCAB), Contrastive()
    batch = batch_of(task, shown, pairs=6)
    axes = families.axes(student)
    cut(student, axes, Mask({"vision.layers": torch.tensor([True, False, True, True])}))
    loss = partial(distil_towers, student, batch, teacher=teacher, task=task)
    with torch.no_grad():
        ours, theirs = (m(**inputs(shown, 6), return_loss=True, output_hidden_states=True) for m in (student, teacher))
        assert float(loss(**OFF | {"contrast": 1.0})) == pytest.approx(6 * float(ours.loss), rel=1e-4)
        far = sum(
            float((a - b).square().sum())
            for a, b in ((ours.text_embeds, theirs.text_embeds), (ours.image_embeds, theirs.image_embeds))
        )
        assert float(loss(**OFF | {"output": 2.0})) == pytest.approx(2 * far, rel=1e-4)
        both = ((ours.logits_per_image, theirs.logits_per_image), (ours.logits_per_text, theirs.logits_per_text))
        kl = sum(float((F.softmax(q, 1) * (F.log_softmax(q, 1) - F.log_softmax(p, 1))).sum()) for p, q in both) / 2
        assert float(loss(**OFF | {"similarity": 1.0})) == pytest.approx(kl, rel=1e-3)
        pixels = inputs(shown, 6)["pixel_values"]
        seen, goal = (m.get_image_features(pixels, output_hidden_states=True).hidden_states for m in (student, teacher))
        distance = sum(
            float(((seen[i] - goal[m]).square().sum(-1) / goal[m].square().sum(-1)).mean(-1).sum())
            for i, m in ((1, 1), (2, 3), (3, 4))
        )
        assert float(loss(**OFF | {"hidden": 1.0})) == pytest.approx(distance / 3, rel=1e-4), "the text tower is the same"
    loss().backward()
    assert student.vision_model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_a_teacher_of_another_width_is_refused(shown: Path) -> None:
    teacher, task = tiny_towers(vocab_size=VOCAB), Contrastive()
    batch, axes = batch_of(task, shown, pairs=4), families.axes(teacher)
    cut(teacher, axes, Mask({"projection": torch.arange(32) < 20}))
    with pytest.raises(UsageError, match="the outputs of the teacher have 20 dimensions and the model's 32"):
        distil_towers(tiny_towers(vocab_size=VOCAB), batch, teacher=teacher, task=task)


def test_a_run_learns_from_the_dense_model(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    training: dict[str, Any] = {
        "source": str(shown), "length": 26, "tokens": 8000, "batch_tokens": 1248, "lr": 0.003, "objective": "pairs.distil_towers(contrast=0)",
        "gradient_checkpointing": True,
    }  # fmt: skip
    run(suited(keys(clip_folder, shown, budget="85%", training=training, reduce="towers(tower=vision)")), tmp_path / "run")
    steps = log_of(tmp_path / "run", "step")
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("objective", ["objectives.distil", "pairs.distil_towers"])
def test_an_objective_of_the_other_kind_is_refused(
    objective: str,
    clip_folder: Path,
    shown: Path,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    of_pairs = objective == "pairs.distil_towers"
    model, source = (tiny_folder, text_file) if of_pairs else (clip_folder, shown)
    training = {"source": str(source), "length": 26, "tokens": 1000, "batch_tokens": 520, "objective": objective}
    recipe = {
        "method": "uniform",
        "model": str(model),
        "budget": "80%",
        "training": training,
        "calibration": {"source": str(source), "samples": 4},
    }
    assert_refused(lambda: suited(recipe), tmp_path / "run", "two towers")
