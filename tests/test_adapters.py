"""LoRA: what an addition changes while it trains, and that nothing of it stays but its product."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report.with_card import run
from adapt_pruner.train.adapters import adapted, base_name
from adapt_pruner.train.loop import TrainState, make_optimizer
from adapt_pruner.train.objectives import lm
from conftest import LAYOUTS, assert_same_model, break_off, log_of, tiny_model, train

pytest.importorskip("peft", reason="peft, which makes the additions, is not installed: pip install '.[lora]'")

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 0}


class Counting:
    """Rows that count upwards: easy to learn."""

    ids = 3 + (torch.arange(24)[:, None] + torch.arange(16)) % 90

    def batch(self, start: int, stop: int) -> tuple[Tensor, None]:
        return self.ids[start:stop], None

    def num_tokens(self, start: int, stop: int) -> int:
        return self.ids[start:stop].numel()


def learn(model: Any, *stops: int, seed: int = 0) -> None:
    """Train, in place, up to a row, in as many calls as there are stops."""
    progress, optimizer = TrainState(), make_optimizer(model, lr=2e-2, weight_decay=0.0)
    for until in stops:
        train(
            model, Counting(), until=until, optimizer=optimizer, objective=lm, schedule=lambda done: 1.0, lr=2e-2,
            total_tokens=Counting.ids.numel(), batch_rows=4, progress=progress, dtype="float32", seed=seed,
        )  # fmt: skip
        torch.rand(3)


def additions(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora" in name}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(Counting.ids[:3]).logits
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_it_begins_at_the_model_and_ends_merged_in_it(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    model.model.norm.weight.requires_grad_(False)
    shape = [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]
    kind, modules, before = type(model), [type(module) for module in model.modules()], logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with adapted(model, **LORA):
        assert torch.equal(logits(model), before), "B is zero: the model is what it was"
        learn(model, 24)
        during = logits(model)
        assert not torch.allclose(during, before, atol=0.1), "something was learnt"
        base = {inner: tensor for name, tensor in model.state_dict().items() if (inner := base_name(name)) is not None}
        assert base.keys() == weights.keys()
        assert all(torch.equal(base[name], weights[name]) for name in weights), "the weights themselves do not move"
        pieces = additions(model)

    assert torch.allclose(logits(model), during, atol=1e-5, rtol=1e-5)
    assert [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()] == shape
    assert (type(model), [type(module) for module in model.modules()]) == (kind, modules)
    assert not any("peft" in key or "lora" in key for key in model.__dict__)
    assert not model.training
    for name, after in model.state_dict().items():
        a, b = (pieces.get(name.replace(".weight", f".lora_{factor}.default.weight")) for factor in "AB")
        if a is None or b is None:
            assert torch.equal(after, weights[name]), f"{name} has no addition"
        else:
            assert torch.allclose(after, weights[name] + 8.0 / 4 * b @ a, atol=1e-6), name


def test_every_linear_layer_but_the_head_is_added_to_and_nothing_else_trains() -> None:
    model = tiny_model(("llama", "llama-mha-biased"))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert len(linear) == 3 * 7
    with adapted(model, **LORA | {"rank": 5}):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"}
        assert all(min(tensor.shape) == 5 for tensor in additions(model).values())


def test_the_addition_is_drawn_from_its_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = tiny_model()
        torch.rand(int(torch.randint(1, 50, ())))
        state = torch.get_rng_state()
        with adapted(model, **LORA | {"seed": seed}):
            assert torch.equal(torch.get_rng_state(), state), "nobody else's draws are disturbed"
            return additions(model)

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in one:
        assert bool(one[name].any()) == (".lora_A." in name)
        assert torch.equal(one[name], other[name]) == (".lora_B." in name)


def test_dropout_is_drawn_from_the_seed_and_the_step_alone() -> None:
    def trained(*stops: int, seed: int = 0, dropout: float = 0.4) -> Tensor:
        model = tiny_model()
        with adapted(model, **LORA | {"dropout": dropout}):
            learn(model, *stops, seed=seed)
            assert torch.equal(logits(model), logits(model)), "not outside training"
        return logits(model)

    whole = trained(24)
    assert torch.equal(whole, trained(8, 12, 24)), "also when training is called three times"
    assert not torch.equal(whole, trained(24, seed=1))
    assert not torch.equal(whole, trained(24, dropout=0.0)), "there is dropout"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_it_can_be_cut_and_adapted_again(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    for turn in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft warns of a model that still has an addition
            with adapted(model, **LORA | {"seed": turn}):
                learn(model, 8)
        axes = families.axes(model)
        assert all(
            "lora" not in piece.parameter and "base_layer" not in piece.parameter for axis in axes for piece in axis.slices
        )
        narrowed = [axis for axis in axes if axis.kind in ("kv_heads", "neurons")]
        mask = Mask({axis.name: torch.arange(axis.size) < max(1, axis.size - 1) for axis in narrowed})
        before = sum(parameter.numel() for parameter in model.parameters())
        cut(model, axes, mask)
        gone = sum(axis.cost for axis in narrowed if axis.size > 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == before - gone
        assert bool(logits(model).isfinite().all())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_base_in_bfloat16_stays_so_and_is_merged_in_float32_and_rounded_at_random() -> None:
    """Each weight becomes one of the two numbers beside the sum, and the additions, which most weights would lose, are there on average."""
    model = tiny_model().to(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapted(model, **LORA):
        kinds = {base_name(name) is None: parameter.dtype for name, parameter in model.named_parameters()}
        assert kinds == {True: torch.float32, False: torch.bfloat16}
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=2e-4)
        learn(model, 4)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.mul_(0.02)
        pieces = additions(model)
    moved, left, lost = [], 0, 0
    for name, after in model.state_dict().items():
        a, b = (pieces.get(name.replace(".weight", f".lora_{factor}.default.weight")) for factor in "AB")
        assert after.dtype == torch.bfloat16
        if a is None or b is None:
            assert torch.equal(after, weights[name]), name
            continue
        whole = weights[name].float() + 8.0 / 4 * b @ a
        spacing = whole.abs() * 2**-7
        assert bool(((after.float() - whole).abs() <= spacing).all()), "one of the neighbours"
        moved.append(torch.stack([after.float() - weights[name].float(), whole - weights[name].float()]).flatten(1))
        left += int((whole != weights[name].float()).sum())
        lost += int((whole.bfloat16() == weights[name]).sum())
    assert lost > 0.5 * left, "rounded to the nearest, most would stay as they were"
    change, wanted = torch.cat(moved, dim=1)
    assert float(change @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.15), "right on average"


def test_a_merged_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    with adapted(model, **LORA):
        learn(model, 8)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_names_of_parameters_lead_back_to_the_model() -> None:
    model = tiny_model(("llama", "qwen2"))
    plain = [name for name, _ in model.named_parameters()]
    with adapted(model, **LORA):
        found = [base_name(name) for name, _ in model.named_parameters()]
    assert [name for name in found if name is not None] == plain
    assert found.count(None) == 2 * 7 * 3


def test_after_an_error_the_addition_stays_where_it_is() -> None:
    """A run that stops there is not gone on with in this process; its checkpoint is."""
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), adapted(model, **LORA):
        _ = 1 / 0
    assert additions(model)


def test_without_peft_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(UsageError, match=re.escape(f"training.lora needs the peft package; {to_install('lora')}")),
        adapted(tiny_model(), **LORA),
    ):
        raise AssertionError("not reached")


def test_a_run_on_a_base_in_bfloat16_that_was_broken_off_ends_as_if_it_had_not_been(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second stage, after a merge that was rounded at random; torchao is not needed."""
    monkeypatch.setitem(sys.modules, "adapt_pruner.train.lowbit", None)
    training = {
        "source": str(text_file),
        "tokens": 512,
        "batch_tokens": 128,
        "length": 32,
        "lora": {"rank": 2},
        "weights": "bfloat16",
    }
    asked = {
        "model": str(tiny_folder),
        "budget": "80%",
        "method": "magnitude-all",
        "stages": 2,
        "training": {**training, "lr": 1e-2},
    }
    recipe = read({**asked, "checkpoint_minutes": 0, "keep_checkpoints": 9})
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "run", kind="step", nth=3)
    run(recipe, tmp_path / "run")
    assert log_of(tmp_path / "run", "resumed")
    assert_same_model(tmp_path / "whole", tmp_path / "run")
    merged = load_file(tmp_path / "run" / "checkpoints" / "stage-1" / "model.safetensors")
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in merged.values())


def test_a_checkpoint_whose_additions_are_not_merged_is_no_model(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Its weights are those from before the training, which alone would be measured; its own run continues from it."""
    training = {"source": str(text_file), "tokens": 256, "batch_tokens": 128, "length": 32, "lora": {"rank": 2}}
    asked = {"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all", "training": training}
    recipe, checkpoints = read({**asked, "moments": "reset", "checkpoint_minutes": 0}), tmp_path / "run" / "checkpoints"
    break_off(recipe, tmp_path / "run", kind="step", nth=2)
    within = checkpoints / "stage-1-step-1"
    with pytest.raises(UsageError, match=f"{within} holds LoRA adapters that are not merged into its weights yet; continue"):
        load(str(within))
    assert load(str(checkpoints / "stage-1-pruned")).mask is not None
    run(recipe, tmp_path / "run")
    assert [event["step"] for event in log_of(tmp_path / "run", "resumed")] == [1]
