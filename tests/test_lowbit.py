"""Moments of 8 and 4 bits, weights in bfloat16 and steps within the backward pass: what they compute, how they follow cuts and go on."""

import copy
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.moments import is_quantised
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report.with_card import run
from adapt_pruner.train.loop import TrainState, make_optimizer
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.spread import full_state, load_moments
from conftest import VOCAB, assert_same_model, break_off, byte_tokenizer, half, log_of, read_json, saved, tiny_model, train
from test_adapters import Counting

torchao_optim = pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install '.[torchao]'")
lowbit = importlib.import_module("adapt_pruner.train.lowbit")

WIDE = {"hidden_size": 96, "intermediate_size": 128, "vocab_size": VOCAB}
"""Wide enough that moments are quantised: 4,096 numbers or more."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors here take several pieces, the last of them shorter."""
    monkeypatch.setattr(lowbit, "PIECE", 5 * 1024)


def optimizer_of(model: nn.Module, *, bits: int = 8, **options: Any) -> Any:
    return make_optimizer(model, **{"lr": 1e-2, "weight_decay": 0.0, **options}, bits=bits, torchao="training.optimizer")


def learn(model: Any, optimizer: Any, *, until: int = 12, clip: float = 1.0, **how: Any) -> Any:
    train(
        model, Counting(), until=until, optimizer=optimizer, schedule=lambda done: 1.0, lr=1e-2, clip=clip,
        total_tokens=Counting.ids.numel(), batch_rows=4, progress=TrainState(), **{"dtype": "float32", "objective": lm, **how},
    )  # fmt: skip
    return model


def moments_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.dequantize() if is_quantised(value) else value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key != "step"
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_with_32_bits_it_is_adamw() -> None:
    ours, torchs = (tiny_model(**WIDE) for _ in range(2))
    learn(ours, optimizer_of(ours, bits=32, weight_decay=0.1))
    learn(torchs, make_optimizer(torchs, lr=1e-2, weight_decay=0.1))
    for name, weight in weights_of(torchs).items():
        torch.testing.assert_close(ours.get_parameter(name).data, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "width", "off"), [(8, 256, 0.01), (4, 128, 0.12)])
def test_quantised_moments_are_near_those_of_adamw(bits: int, width: int, off: float) -> None:
    """One step from the same weights: each number is off by a share of the largest in its block, and takes so many bits."""
    ours, torchs = (tiny_model(**WIDE) for _ in range(2))
    optimizer, reference = optimizer_of(ours, bits=bits), make_optimizer(torchs, lr=1e-2, weight_decay=0.0)
    learn(ours, optimizer, until=4)
    learn(torchs, reference, until=4)
    kinds = {name: [is_quantised(value) for value in optimizer.state[p].values()] for name, p in ours.named_parameters()}
    sizes = {name: parameter.numel() for name, parameter in ours.named_parameters()}
    assert all(any(kind) == (sizes[name] >= 4096 and sizes[name] % width == 0) for name, kind in kinds.items())
    assert sum(map(any, kinds.values())) == 3 * 5, (
        "all linear layers but k_proj and v_proj, which are small; the embedding is no whole number of blocks"
    )
    exact = moments_of(torchs, reference)
    for name, moment in moments_of(ours, optimizer).items():
        if any(kinds[name.partition(".")[2]]):
            blocks = (moment - exact[name]).view(-1, width), exact[name].view(-1, width)
            assert bool((blocks[0].abs() <= off * blocks[1].abs().amax(-1, keepdim=True) + 1e-20).all()), name
    codes = optimizer.state[ours.get_parameter("model.layers.0.mlp.up_proj.weight")]["exp_avg"].codes
    assert codes.numel() * 8 == bits * 96 * 128


def test_pieces_do_not_change_what_a_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces, whole = (tiny_model(**WIDE) for _ in range(2))
    learn(in_pieces, optimizer_of(in_pieces))
    monkeypatch.setattr(lowbit, "PIECE", 2**20)
    learn(whole, optimizer_of(whole))
    assert all(torch.equal(in_pieces.get_parameter(name).data, weight) for name, weight in weights_of(whole).items())


@pytest.mark.parametrize("bits", [8, 4])
def test_moments_follow_a_cut(bits: int) -> None:
    """Those of what is left are those before, up to one more rounding; those of parameters that kept their shape are untouched."""
    model = tiny_model(**WIDE)
    optimizer = optimizer_of(model, bits=bits)
    learn(model, optimizer)
    axes = families.axes(model)
    before, codes, whole = moments_of(model, optimizer), full_state(model, optimizer)[1], weights_of(model)
    mask = Mask(half([axis for axis in axes if axis.layer == 1]).kept)
    cut(model, axes, mask, optimizer=optimizer)
    after, kept = moments_of(model, optimizer), torch.arange(128) % 2 == 0
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}
    for name, moment in after.items():
        parameter = model.get_parameter(name.partition(".")[2])
        assert moment.shape == parameter.shape
        if parameter.shape == whole[name.partition(".")[2]].shape:
            key, _, rest = name.partition(".")
            stored = [value for other, value in codes.items() if other in (name, f"{key}.codes.{rest}", f"{key}.scale.{rest}")]
            held = optimizer.state[parameter][key]
            now = [held.codes, held.scale] if is_quantised(held) else [held]
            assert all(any(torch.equal(tensor, one) for one in stored) for tensor in now), f"{name} was not cut"
        else:
            expected = before[name][:, kept] if "down_proj" in name else before[name][kept]
            assert is_quantised(optimizer.state[parameter][name.partition(".")[0]])
            step = (0.01 if bits == 8 else 0.12) * expected.abs().max()
            assert float((moment - expected).abs().max()) <= step, name
            assert float(expected.abs().max()) > 0
    learn(model, optimizer, until=4)


def test_moments_too_few_to_be_quantised_after_a_cut_are_float32() -> None:
    """48 of 96 · 128 numbers are no whole number of blocks, or fewer than 4,096."""
    model = tiny_model(**WIDE)
    optimizer = optimizer_of(model)
    learn(model, optimizer)
    axes = families.axes(model)
    before = moments_of(model, optimizer)
    kept = torch.arange(128) < 45
    cut(model, axes, Mask({axis.name: kept for axis in axes if axis.kind == "neurons"}), optimizer=optimizer)
    up = model.model.layers[0].mlp.up_proj.weight
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[up][key]
        assert not is_quantised(moment)
        assert torch.equal(moment, before[f"{key}.model.layers.0.mlp.up_proj.weight"][kept]), "no rounding"
    learn(model, optimizer)


def test_moments_follow_a_factor() -> None:
    """Norms whose mean runs over fewer channels are multiplied; small tensors are float32, so one is made large here."""
    from adapt_pruner.core.model.moments import multiply

    weight = nn.Parameter(torch.randn(8, 1024))
    optimizer = optimizer_of(nn.ParameterList([weight]))
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    before = {key: state[key].dequantize() for key in ("exp_avg", "exp_avg_sq")}
    multiply(optimizer, weight, 2.0)
    torch.testing.assert_close(state["exp_avg"].dequantize(), before["exp_avg"] / 2)
    torch.testing.assert_close(state["exp_avg_sq"].dequantize(), before["exp_avg_sq"] / 4)


@pytest.mark.parametrize("key", ["state1", "absmax1", "row_var"])
def test_state_of_an_unknown_kind_is_refused_before_anything_is_cut(key: str) -> None:
    """bitsandbytes holds codes of the weight's shape and their scales in another tensor: sliced alone they would mean other numbers."""
    model = tiny_model(**WIDE)
    parameter = model.model.layers[0].mlp.up_proj.weight
    value = {
        "state1": torch.zeros_like(parameter, dtype=torch.uint8), "absmax1": torch.zeros(48), "row_var": torch.zeros(128, 1),
    }[key]  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[parameter] = {"step": 3, key: value}
    axes, before = families.axes(model), weights_of(model)
    sentence = rf"AdamW holds '{key}', {value.dtype} .* and how that follows a cut is not known; empty the state .*optimizer.state.clear\(\)"
    with pytest.raises(ValueError, match=sentence):
        cut(model, axes, half(axes), optimizer=optimizer)
    assert all(torch.equal(model.get_parameter(name).data, weight) for name, weight in before.items())
    optimizer.state.clear()
    cut(model, axes, half(axes), optimizer=optimizer)


def test_torchaos_own_optimiser_follows_too() -> None:
    """One that a user made: its learning rate is a tensor, and `cut` knows its moments."""
    model = tiny_model(**WIDE)
    optimizer = torchao_optim.AdamW8bit(model.parameters(), lr=1e-2)
    with torch.compiler.set_stance("force_eager"):
        ap.train(model, [Counting.ids[:4]], optimizer=optimizer, dtype="float32")
        axes = families.axes(model)
        cut(model, axes, half(axes), optimizer=optimizer)
        assert is_quantised(optimizer.state[model.model.layers[0].mlp.up_proj.weight]["exp_avg"])
        losses = ap.train(model, [Counting.ids[:4]], optimizer=optimizer, dtype="float32")
    assert math.isfinite(losses[0])


def test_weights_in_bfloat16_are_rounded_at_random() -> None:
    """A weight of 1 that is to fall by 1e-4 a step: the next number below it is 0.996, so to the nearest it would never move."""
    weight = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    optimizer = optimizer_of(nn.ParameterList([weight]), lr=1e-4)
    torch.manual_seed(0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 20 * 1e-4, rel=1e-4)


def test_means_that_are_not_quantised_are_float32_beside_bfloat16() -> None:
    weight = nn.Parameter(torch.ones(96, dtype=torch.bfloat16))
    optimizer = optimizer_of(nn.ParameterList([weight]))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("quantised", [False, True])
def test_a_step_within_the_backward_pass_is_the_same_step(*, quantised: bool) -> None:
    """Without clipping, to the last bit: also of an embedding that is the head, whose gradient has two parts."""

    def learnt(*, in_backward: bool) -> dict[str, Tensor]:
        model = tiny_model(**WIDE)
        assert model.config.tie_word_embeddings
        optimizer = optimizer_of(model) if quantised else make_optimizer(model, lr=1e-2, weight_decay=0.1)
        learn(model, optimizer, clip=math.inf, in_backward=in_backward)
        assert all(parameter.grad is None for parameter in model.parameters())
        return weights_of(model)

    before, plain, within = weights_of(tiny_model(**WIDE)), learnt(in_backward=False), learnt(in_backward=True)
    assert all(torch.equal(within[name], plain[name]) for name in plain)
    assert not any(torch.equal(within[name], before[name]) for name in plain)


def test_no_gradient_but_one_is_alive_at_a_time_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = tiny_model(**WIDE), []
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
    step = type(optimizer).step

    def watched(self: Any, closure: Any = None) -> Any:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return step(self, closure)

    monkeypatch.setattr(type(optimizer), "step", watched)
    learn(model, optimizer, until=4, clip=math.inf, in_backward=True)
    assert alive == [1] * len(list(model.parameters()))


def test_a_gradient_that_is_not_finite_takes_no_step_within_the_backward_pass() -> None:
    model = tiny_model(**WIDE)
    before = weights_of(model)

    def spoiled(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        return lm(model, ids, predicted) * math.nan

    with pytest.raises(RunError, match=r"the training loss became nan \(gradient norm nan\) at step 1; lower training.lr"):
        learn(model, make_optimizer(model, lr=1e-2, weight_decay=0.0), clip=math.inf, in_backward=True, objective=spoiled)
    assert all(torch.equal(model.get_parameter(name).data, weight) for name, weight in before.items())


def test_moments_are_stored_as_codes_and_scales_and_come_back_to_the_last_bit() -> None:
    """Quantised twice, 8-bit numbers change; and moments of another number of bits are refused."""
    model = tiny_model(**WIDE)
    optimizer = optimizer_of(model)
    learn(model, optimizer)
    _, stored = full_state(model, optimizer)
    up = "model.layers.0.mlp.up_proj.weight"
    assert stored[f"exp_avg.codes.{up}"].dtype == torch.uint8
    assert f"exp_avg.{up}" not in stored
    again = optimizer_of(model)
    load_moments(model, again, copy.deepcopy(stored))
    _, twice = full_state(model, again)
    assert stored.keys() == twice.keys()
    assert all(torch.equal(stored[key], twice[key]) for key in stored)
    for other in (optimizer_of(model, bits=4), optimizer_of(model, bits=32), make_optimizer(model, lr=1e-2, weight_decay=0.0)):
        with pytest.raises(
            UsageError, match="the checkpoint's moments of .* have another number of bits than this run's training.optimi"
        ):
            load_moments(model, other, stored)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "wide", tiny_model(**WIDE), byte_tokenizer())


@pytest.fixture
def keys(wide_folder: Path, text_file: Path) -> dict[str, Any]:
    training = {
        "source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32, "lr": 1e-2, "optimizer": "adamw8bit",
        "weights": "bfloat16", "schedule": "schedules.wsd",
    }  # fmt: skip
    return {
        "model": str(wide_folder), "budget": "80%", "method": "magnitude-all", "multiple_of": 32, "stages": 2, "training": training,
        "checkpoint_minutes": 0, "keep_checkpoints": 9,
    }  # fmt: skip


def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(keys: dict[str, Any], tmp_path: Path) -> None:
    """Broken off in the second stage, with moments that went through a cut and weights that are rounded at random."""
    recipe = read(keys)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "run", kind="step", nth=3)
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert read_json(newest / "state.json")["stage"] == 2
    moments = load_file(newest / "optimizer.safetensors")
    assert any(".codes." in key for key in moments)
    run(recipe, tmp_path / "run")
    assert log_of(tmp_path / "run", "resumed")
    assert_same_model(tmp_path / "whole", tmp_path / "run")
    weights = load_file(newest / "model.safetensors")
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()), "trained as bfloat16"


def test_settings_that_do_not_go_together_are_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    def refusal(**training: Any) -> str:
        others = {key: training.pop(key) for key in ("parallel", "dtype", "method", "axes", "feed") if key in training}
        with pytest.raises(UsageError) as caught:
            run(read({**keys, **others, "training": {**keys["training"], **training}}), tmp_path / "refused")
        return str(caught.value)

    within: dict[str, Any] = {"step_in_backward": True, "clip": None}
    assert (
        "training.step_in_backward takes steps before the norm of all gradients is known, and training.clip is 1; set clip to null"
        in (refusal(step_in_backward=True))
    )
    assert "training.micro_batch_tokens 64 is below its 128 tokens; leave micro_batch_tokens out" in refusal(
        **within, micro_batch_tokens=64
    )
    assert "training.lora on weights in bfloat16 does not work with parallel 'fsdp'; set parallel to ddp" in refusal(
        parallel="fsdp", lora={"rank": 2}, optimizer="adamw"
    )
    assert "training.step_in_backward does not work with parallel 'fsdp'" in refusal(
        **within, parallel="fsdp", optimizer="adamw", weights="float32"
    )
    assert "training.weights 'bfloat16' are multiplied in bfloat16, and dtype is 'float32'" in refusal(dtype="float32")
    assert "does not work with training.optimizer adamw8bit and training.weights bfloat16; leave them out" in refusal(
        method="efficientllm", axes=["neurons"]
    )
    assert not (tmp_path / "refused" / "checkpoints").exists()


def test_without_torchao_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adapt_pruner.train.lowbit", None)
    with pytest.raises(UsageError) as caught:
        optimizer_of(tiny_model())
    assert str(caught.value) == f"training.optimizer needs the package torchao; {to_install('torchao')}"
