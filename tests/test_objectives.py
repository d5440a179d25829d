"""What training minimises, against full logits in plain torch; and that full logits are never held."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapt_pruner.core.model import loss as core_loss
from adapt_pruner.core.model.loss import log_softmax_, nll_of_logits, through_head
from adapt_pruner.core.model.precision import precision
from adapt_pruner.errors import UsageError
from adapt_pruner.train.objectives import distil, lm, named_loss
from conftest import tiny_model

UNTIED = ("llama", "qwen3-untied")
CAPPED = ("gemma3", "gemma3-capped")
ROWS, LENGTH, VOCAB, WIDTH = 3, 18, 97, 48


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> Tensor:
    """About half of the tokens; nothing of the last row."""
    predicted = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    predicted[:, 0] = True
    predicted[-1] = False
    return predicted


def pair(layout: tuple[str, str] = UNTIED, **changes: Any) -> tuple[Any, Any]:
    """A student and a teacher, both in double precision."""
    return tiny_model(layout, seed=0).double(), tiny_model(layout, seed=1, **changes).double()


def layer_outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer gives, the last after the final norm."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, args, output: seen.append(output)) for layer in model.model.layers]
    last = model.model(ids).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*seen[:-1], last]


def plainly(
    model: Any, ids: Tensor, mask: Tensor | None, *, teacher: Any = None, temperature: float = 1.0, alpha: float = 0.0, hidden: float = 0.0
) -> Tensor:  # fmt: skip
    """(1 - α) · cross-entropy + α · T² · KL [+ hidden · distance] with all logits held; position t counts if token t + 1 does."""
    counts = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:]
    logits = model(ids).logits[:, :-1][counts]
    total = (1 - alpha) * F.cross_entropy(logits, ids[:, 1:][counts], reduction="sum")
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(ids).logits[:, :-1][counts]
        p, q = F.log_softmax(wanted / temperature, -1), F.log_softmax(logits / temperature, -1)
        total = total + alpha * temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)
    if hidden:
        with torch.no_grad():
            theirs = layer_outputs(teacher, ids)
        ours = layer_outputs(model, ids)
        distances = [((h - g) ** 2).sum(-1) / (g**2).sum(-1) for h, g in zip(ours, theirs, strict=True)]
        total = total + hidden * torch.stack([distance[:, :-1][counts].sum() for distance in distances]).mean()
    return total


def value(total: Tensor) -> float:
    return float(total.detach())


def agree(one: Any, other: Any, *, rtol: float) -> None:
    """Every parameter of two models has the same gradient."""
    for (name, ours), theirs in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if ours.grad is None or theirs[1].grad is None:
            assert ours.grad is None is theirs[1].grad, name
        else:
            scale = float(theirs[1].grad.abs().max())
            assert torch.allclose(ours.grad, theirs[1].grad, rtol=rtol, atol=rtol * scale), name


def in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int, rows: int) -> None:
    """`chunk` tokens have logits at one time, of which `rows` are worked on."""
    monkeypatch.setattr(core_loss, "MAX_LOGITS", chunk * VOCAB)
    monkeypatch.setattr(core_loss, "CACHED_ROWS", rows)


PIECES = [(1, 1), (7, 3), (1000, 5)]  # the last ones cut short, the logits of one chunk worked on at once or not


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("layout", [UNTIED, ("llama", "llama"), CAPPED], ids=lambda layout: layout[1])
def test_lm_is_the_cross_entropy(
    layout: tuple[str, str], pieces: tuple[int, int], masked: bool, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, *pieces)
    model, twin = (tiny_model(layout).double() for _ in range(2))
    predicted = mask if masked else None
    total, expected = lm(model, ids, predicted), plainly(twin, ids, predicted)
    assert value(total) == pytest.approx(value(expected), rel=1e-9)
    (3 * total).backward()
    (3 * expected).backward()
    agree(model, twin, rtol=1e-8)


@pytest.mark.parametrize("hidden", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pieces", PIECES)
def test_distil_is_what_it_says(
    pieces: tuple[int, int], alpha: float, temperature: float, hidden: float, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    in_pieces(monkeypatch, *pieces)
    for predicted in (None, mask):
        (model, teacher), twin = pair(), tiny_model(UNTIED, seed=0).double()
        options = {"teacher": teacher, "temperature": temperature, "alpha": alpha, "hidden": hidden}
        total, expected = distil(model, ids, predicted, **options), plainly(twin, ids, predicted, **options)
        exact = 1e-5 if hidden else 1e-9  # the distance of hidden states is worked out in float32
        assert value(total) == pytest.approx(value(expected), rel=exact)
        (0.5 * total).backward()
        (0.5 * expected).backward()
        agree(model, twin, rtol=exact * 10)
        assert all(parameter.grad is None for parameter in teacher.parameters()), "the teacher learns nothing"


@pytest.mark.parametrize("capped", ["student", "teacher"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_distil_caps_the_logits_of_student_and_teacher_each_as_it_is(
    alpha: float, capped: str, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, 7, 3)
    caps = (2.0, None) if capped == "student" else (None, 2.0)
    model, teacher, twin = (
        tiny_model(CAPPED, seed=seed, final_logit_softcapping=caps[seed]).double() for seed in (0, 1, 0)
    )  # fmt: skip
    options = {"teacher": teacher, "temperature": 1.5, "alpha": alpha}
    total, expected = distil(model, ids, mask, **options), plainly(twin, ids, mask, **options)
    assert value(total) == pytest.approx(value(expected), rel=1e-9)
    total.backward()
    expected.backward()
    agree(model, twin, rtol=1e-8)


@pytest.mark.parametrize("num_tokens", [20, 0])
@pytest.mark.parametrize(
    "frozen", [(), ("weight",), ("bias",), ("hidden",), ("weight", "bias")], ids=lambda frozen: " ".join(frozen)
)
def test_the_head_may_have_a_bias_and_anything_may_be_frozen(frozen: tuple[str, ...], num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(num_tokens) % 11
    grads = []
    for full in (False, True):
        torch.manual_seed(0)
        head, entering = torch.nn.Linear(8, 11).double(), hidden.clone().requires_grad_("hidden" not in frozen)
        head.weight.requires_grad_("weight" not in frozen)
        head.bias.requires_grad_("bias" not in frozen)
        if full:
            loss = F.cross_entropy(head(entering), targets, reduction="sum")
        else:
            loss = through_head(entering, head, nll_of_logits(targets), chunk=6)
        loss.backward()
        grads.append((entering.grad, head.weight.grad, head.bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs)


def test_a_loss_sees_every_logit_once_in_float32_and_no_more_of_them_than_asked_for() -> None:
    head, seen = torch.nn.Linear(8, 11), []

    def noting(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        seen.append((rows.start, rows.stop, logits.dtype, tuple(logits.shape)))
        return logits.sum()

    for dtype in ("float32", "bfloat16"):
        seen.clear()
        with precision(torch.device("cpu"), dtype):
            assert through_head(torch.randn(20, 8), head, noting, chunk=6).dtype == torch.float32
        edges = [(0, 6), (6, 12), (12, 18), (18, 20)]
        assert seen == [(start, stop, torch.float32, (stop - start, 11)) for start, stop in edges]


@pytest.mark.parametrize("objective", ["lm", "distil"])
def test_position_t_is_masked_by_the_token_it_predicts(objective: str, ids: Tensor) -> None:
    """With one predicted token the loss is that token's, given what precedes it; not that of the position under it."""
    model, teacher = pair()
    for at in (1, 5, LENGTH - 1):
        only = torch.zeros_like(ids, dtype=torch.bool)
        only[1, at] = True
        logits, wanted = (m(ids).logits[1, at - 1] for m in (model, teacher))
        if objective == "lm":
            found, expected = lm(model, ids, only), F.cross_entropy(logits, ids[1, at])
        else:
            found = distil(model, ids, only, teacher=teacher, temperature=1.0)
            expected = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), reduction="sum", log_target=True)
        assert value(found) == pytest.approx(value(expected), rel=1e-9)
    only = torch.zeros_like(ids, dtype=torch.bool)
    only[:, 0] = True
    assert value(lm(model, ids, only) if objective == "lm" else distil(model, ids, only, teacher=teacher)) == 0.0


@pytest.mark.parametrize("layout", [UNTIED, ("llama", "llama")], ids=lambda layout: layout[1])
def test_where_nothing_is_predicted_every_gradient_is_zero_and_there(layout: tuple[str, str], ids: Tensor) -> None:
    """There, since processes add their gradients up one by one: who has none would put the others out of step."""
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    for objective in ({}, {"teacher": pair(layout)[1], "hidden": 0.5}):
        model = tiny_model(layout).double()
        total = distil(model, ids, nothing, **objective) if objective else lm(model, ids, nothing)
        total.backward()
        assert value(total) == 0.0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_student_that_is_its_teacher_has_nothing_to_learn(ids: Tensor, mask: Tensor) -> None:
    model, teacher = tiny_model(UNTIED).double(), tiny_model(UNTIED).double()
    total = distil(model, ids, mask, teacher=teacher, temperature=3.0, hidden=1.0)
    total.backward()
    assert value(total) == pytest.approx(0.0, abs=1e-9)
    assert all(float(p.grad.abs().max()) < 1e-9 for p in model.parameters())


def test_hidden_states_that_do_not_compare_are_refused(ids: Tensor) -> None:
    model = tiny_model(UNTIED)
    shallow = tiny_model(UNTIED, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.raises(UsageError, match=r"the model has 3 layers of width 48, the teacher 2 of 48; leave out the option hidden"):
        distil(model, ids, teacher=shallow, hidden=0.1)
    narrow = tiny_model(UNTIED, hidden_size=24)
    with pytest.raises(UsageError, match=r"the model has 3 layers of width 48, the teacher 3 of 24"):
        distil(model, ids, teacher=narrow, hidden=0.1)
    for teacher in (shallow, narrow):
        assert value(distil(model, ids, teacher=teacher)) > 0, "logits compare all the same"


class Recorder(TorchDispatchMode):
    """The most elements that any tensor with one entry a token of the vocabulary has had."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCAB,) and tensor.shape != (WIDTH, VOCAB):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["lm", "distil"])
def test_full_logits_are_never_held(objective: str, dtype: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the student's nor the teacher's, forward or backward."""
    model, teacher = tiny_model(UNTIED), tiny_model(UNTIED, seed=1)
    num_tokens = ROWS * (LENGTH - 1)
    losses: dict[str, Callable[[], Tensor]] = {
        "lm": lambda: lm(model, ids),
        "distil": lambda: distil(model, ids, teacher=teacher, alpha=0.5, hidden=0.5),
    }
    with Recorder() as plain:
        plainly(model, ids, None).backward()
    assert plain.largest >= num_tokens * VOCAB, "it would be seen"
    for chunk, rows, most in ((8, 4, 8), (2, 4, 4), (1000, 4, num_tokens)):
        in_pieces(monkeypatch, chunk, rows)
        with Recorder() as seen:
            with precision(torch.device("cpu"), dtype):
                total = losses[objective]()
            total.backward()
        assert seen.largest == most * VOCAB, "at least as many tokens as are worked on, and no more than asked for"


@pytest.mark.parametrize("objective", ["lm", "distil"])
def test_without_autograd_only_the_value_is_worked_out(objective: str, ids: Tensor) -> None:
    """Perplexity needs no gradient of the head, although the weights could have one."""
    model, teacher = pair()
    wanted = []

    def noting(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        wanted.append(gradient)
        return logits.sum()

    hidden = torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        through_head(hidden, model.lm_head, noting)
        value = lm(model, ids) if objective == "lm" else distil(model, ids, teacher=teacher, alpha=0.3)
    through_head(hidden, model.lm_head, noting)
    assert wanted == [False, True]
    with_gradient = lm(model, ids) if objective == "lm" else distil(model, ids, teacher=teacher, alpha=0.3)
    assert torch.equal(value, with_gradient.detach())
    assert not value.requires_grad


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_the_gradient_in_bfloat16_is_as_close_as_autocast_is(alpha: float | None, ids: Tensor, mask: Tensor) -> None:
    """The error against float32 is no more than 1.5 times that of full logits under torch's own autocast."""
    teacher = tiny_model(UNTIED, seed=1)
    options: dict[str, Any] = {} if alpha is None else {"teacher": teacher, "temperature": 2.0, "alpha": alpha}

    def gradient(loss: Any, dtype: str) -> Tensor:
        model = tiny_model(UNTIED)
        with precision(torch.device("cpu"), dtype):
            total = loss(model)
        total.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def ours(model: Any) -> Tensor:
        return lm(model, ids, mask) if alpha is None else distil(model, ids, mask, **options)

    exact = gradient(lambda model: plainly(model, ids, mask, **options), "float32")
    plain = gradient(lambda model: plainly(model, ids, mask, **options), "bfloat16")
    error, usual = (float((found - exact).norm() / exact.norm()) for found in (gradient(ours, "bfloat16"), plain))
    assert 0 < error < 1.5 * usual
    assert usual < 0.1


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 1000), (128, 4099), (2, 49_152)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_softmax_in_place_is_that_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = 9 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits, -1)
    assert log_softmax_(logits) is logits
    assert torch.equal(logits, expected)


def test_a_loss_has_a_name_unless_it_is_the_cross_entropy() -> None:
    def mine() -> None: ...

    name = partial(named_loss, teacher="the dense model")
    assert name(lm, {}) is None
    assert name(distil, {"teacher": None, "temperature": 1.0}) == "KL to the dense model"
    assert name(distil, {"alpha": 0.5, "hidden": 1.0}) == "KL to the dense model + cross-entropy + distance of hidden states"
    assert name(distil, {"alpha": 0.0}) == "cross-entropy"
    assert name(mine, {}) == "mine"
