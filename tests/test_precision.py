"""Weights come to bfloat16 once where many passes are made, and nothing of that is left behind."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.loss import through_head
from adapt_pruner.core.model.precision import casting_once, linears_cast, precision
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.speed import forward_speed
from adapt_pruner.recipe import read
from adapt_pruner.reduce.repair import factors
from adapt_pruner.reduce.repair.closed_form import least_squares, mean_bias
from adapt_pruner.reduce.repair.factors import rescale_blocks
from adapt_pruner.reduce.slice import directions
from adapt_pruner.run.start import begin, prepare
from adapt_pruner.score import activations, calibrate
from adapt_pruner.score.blocks import loss_drop
from adapt_pruner.score.calibrate import mean_loss, score, score_sequentially
from adapt_pruner.score.curvature import kfac
from conftest import byte_tokenizer, tiny_model

BATCHES = [torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(number)) for number in range(3)]


class Casts(TorchDispatchMode):
    """Counts, by the name of the weight, how often one is brought to bfloat16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.dim() == 2}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "")] += 1
        return func(*args, **kwargs)


def repaired(model: Any, repair: Callable[..., None], **options: Any) -> None:
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    mask = Mask({axis.name: torch.arange(axis.size) % 2 == 0 for axis in axes})
    repair(model, families.axes(model), mask, BATCHES, dtype="bfloat16", **options)


def behind(model: Any) -> None:
    axes = families.axes(model)
    sizes = {axis.name: axis.size - 1 for axis in axes if axis.kind == "neurons"}
    score_sequentially(model, axes, sizes, BATCHES, metric=activations.wanda, known={}, dtype="bfloat16")


def rotated(model: Any) -> None:
    for _ in directions(model, BATCHES, 24, dtype="bfloat16"):
        pass


def written(model: Any) -> None:
    selfwritten_windows(model, byte_tokenizer(), samples=40, length=4, seed=0, dtype="bfloat16")


def shut_one_by_one(model: Any) -> None:
    loss_drop(model, [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "mlps")], BATCHES, dtype="bfloat16")


READERS: dict[str, tuple[Callable[[Any], object], int]] = {  # what reads the batches, and how many times each weight may be cast
    "perplexity": (lambda model: perplexity(model, BATCHES, dtype="bfloat16"), 1),
    "mean loss": (lambda model: mean_loss(model, BATCHES, dtype="bfloat16"), 1),
    "speed": (lambda model: forward_speed([model], BATCHES[0], dtype="bfloat16"), 1),
    "activations": (lambda model: score(model, families.axes(model), BATCHES, metrics=[activations.wanda], dtype="bfloat16"), 1),
    "behind": (behind, 2),  # the metric looks, then units are shut
    "least squares": (lambda model: repaired(model, least_squares), 1),
    "least squares in sequence": (lambda model: repaired(model, least_squares, sequential=True), 3),  # whole, behind, repaired
    "mean bias": (lambda model: repaired(model, mean_bias), 1),
    "rotation": (rotated, 1),
    "own text": (written, 1),
    "units shut one by one": (shut_one_by_one, 1),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_weights_are_cast_once(reader: str, frozen: bool) -> None:
    model = tiny_model(vocab_size=256).requires_grad_(not frozen)
    read, most = READERS[reader]
    before = list(model.parameters())
    with Casts(model) as casts:
        read(model)
    names = set(casts.names.values()) - {"model.embed_tokens.weight"}
    heads = {name for name in names if "lm_head" in name}
    assert {name: casts.counts[name] for name in names - heads if not 1 <= casts.counts[name] <= most} == {}
    assert casts.counts["model.embed_tokens.weight"] <= 1, "as the head"
    assert all(casts.counts[name] <= 1 for name in heads)
    assert all(parameter.requires_grad is not frozen for parameter in before)


def rescaled(model: Any) -> object:
    axes = families.axes(model)
    mask = Mask({axis.name: torch.arange(axis.size) % 2 == 0 for axis in axes if axis.kind == "neurons"})
    return rescale_blocks(model, axes, mask, BATCHES, dtype="bfloat16")


def by_streams(model: Any) -> object:
    scores, loss = score(model, families.axes(model), BATCHES, metrics=[kfac], dtype="bfloat16")
    return loss, [one.tolist() for one in scores.values()]


@pytest.mark.parametrize("layout", ["llama", "qwen3-untied"])
@pytest.mark.parametrize("read", [rescaled, by_streams])
def test_linear_layers_hold_casts_for_many_passes(
    read: Callable[[Any], object], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight is cast once for all of them, figures are those of casts in every pass, and the weights are what they were."""
    model, again = (tiny_model(("llama", layout), vocab_size=256) for _ in range(2))
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with Casts(model) as casts:
        found = read(model)
    assert {name for name in casts.names.values() if casts.counts[name] != 1} <= {"model.embed_tokens.weight"}
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        assert weight.data_ptr() == before[name] or read is rescaled  # which multiplies some in the end
    for module in (calibrate, factors):
        monkeypatch.setattr(module, "linears_cast", lambda model, dtype: nullcontext())
    with Casts(again) as casts:
        assert read(again) == found
    assert min(casts.counts[name] for name in casts.names.values() if "embed" not in name) > 1
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())


def test_linear_layers_in_float32_are_left_alone() -> None:
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt), linears_cast(model, "bfloat16"):
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.model.embed_tokens.weight.dtype == torch.float32, "it is the head, too"
        raise KeyboardInterrupt
    with linears_cast(model, "float32"):
        assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_a_head_without_a_gradient_is_cast_once_a_call() -> None:
    """Also outside, and in many chunks; and a loss of the logits runs in no autocast."""
    model = tiny_model(vocab_size=256).requires_grad_(False)
    seen: list[bool] = []

    def loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return logits.sum()

    hidden = torch.randn(40, model.config.hidden_size)
    for learns in (False, True):
        model.requires_grad_(learns)
        with torch.no_grad(), Casts(model) as casts, precision(hidden.device, "bfloat16"):
            through_head(hidden, model.get_output_embeddings(), loss, chunk=8)
        assert casts.counts["model.embed_tokens.weight"] + casts.counts["lm_head.weight"] == 1
    assert seen == [False] * 10


def test_other_weights_than_float32_are_read_too() -> None:
    """Autocast leaves float64 alone; the head brings it to bfloat16 all the same."""
    model = tiny_model(vocab_size=256)
    exact, narrow = (mean_loss(model.double(), BATCHES, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow == pytest.approx(exact, rel=0.02)


def test_a_layer_with_nothing_in_it_has_nothing_to_cast() -> None:
    """It lost its attention and its MLP."""
    model = tiny_model(vocab_size=256)
    gone = {f"layers.1.{kind}": torch.tensor([False]) for kind in ("attentions", "mlps")}
    cut(model, families.axes(model), Mask(gone))
    assert not list(model.model.layers[1].parameters())
    repaired(model, least_squares)
    repaired(model, mean_bias)
    behind(model)


@pytest.mark.parametrize("around", [nullcontext(), precision(torch.device("cpu"), "bfloat16")], ids=["alone", "in autocast"])
def test_nothing_is_left_of_it(around: AbstractContextManager[Any]) -> None:
    """A cast that was made without gradients is not used where they are wanted, and figures are what they were."""
    model, ids = tiny_model(vocab_size=256), BATCHES[0]

    def nll() -> Tensor:
        with precision(ids.device, "bfloat16"):
            return CAUSAL_LM.loss(model, ids)

    with torch.no_grad():
        alone = nll()
    with around:
        with torch.no_grad(), casting_once(model):
            assert [nll(), nll()] == [alone, alone]
        weight = model.model.layers[0].mlp.down_proj.weight
        with pytest.raises(KeyboardInterrupt), torch.no_grad(), casting_once(model):
            nll()
            raise KeyboardInterrupt
        with torch.no_grad():
            kept = weight.clone()
            weight.zero_()
            assert nll() != alone, "the weight as it is now is read"
            weight.copy_(kept)
            torch.clear_autocast_cache()
        loss = nll()
        loss.backward()
    assert loss == alone
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("named", [True, False])
def test_a_teacher_in_bfloat16_keeps_its_rotary_frequencies(named: bool, tiny_folder: Path, text_file: Path) -> None:
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 256, "length": 64, "objective": "objectives.distil"}
    asked = {"model": str(tiny_folder), "method": "magnitude-all", "budget": "90%", "dtype": "bfloat16"}
    teacher = {"teacher": str(tiny_folder)} if named else {}
    work = begin(read(asked | {"training": training | teacher}), lambda event: None)
    prepare(work)
    assert {parameter.dtype for parameter in work.data.teacher.parameters()} == {torch.bfloat16}
    ours, theirs = (model.model.rotary_emb.inv_freq for model in (work.model, work.data.teacher))
    assert theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
