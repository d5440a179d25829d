"""The law, over every family file by itself: shutting units and cutting them give the same logits."""

import copy
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from types import MethodType
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.core.model.axes import Axis, Gate, Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated, num_left
from conftest import LAYOUTS, tiny_model

KINDS = ("kv_heads", "query_heads", "neurons", "layers")
WIDTHS = ("kv_heads", "query_heads", "neurons", "residual")
BLOCKS = ("attentions", "mlps")


def wide_norms(model: Any) -> Any:
    """Norms that work in the precision of their input; the stock ones go through float32, to 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def of_gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward if hasattr(module, "variance_epsilon") else of_gemma, module)
    return model


def random_mask(axes: Any, kinds: tuple[str, ...], seed: int) -> Mask:
    """About half of every axis of these kinds, never all and never none of one that has two units or more; about half of all blocks."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for axis in axes:
        if axis.kind in kinds and axis.size > 1:
            keep = torch.ones(axis.groups, axis.size, dtype=torch.bool)
            for block in keep:
                block[torch.randperm(axis.size, generator=generator)[: max(1, axis.size // 2)]] = False
            kept[axis.name] = keep.flatten()
    whole = [axis.name for axis in axes if axis.kind in kinds and axis.modules]
    kept |= {
        name: torch.arange(len(whole))[i : i + 1] >= len(whole) // 2
        for name, i in zip(whole, _shuffled(whole, seed), strict=True)
    }
    return Mask(kept)


def _shuffled(items: list[str], seed: int) -> list[int]:
    order: list[int] = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def gap(model: Any, axes: Any, mask: Mask, ids: torch.Tensor) -> float:
    """Greatest difference between the logits of the gated and of the cut model; infinite when the cut one cannot run."""
    with torch.no_grad():
        with gated(model, axes, mask):
            shut = model(ids).logits
        smaller = copy.deepcopy(model)
        try:
            cut(smaller, axes, mask)
            return float((smaller(ids).logits - shut).abs().max())
        except (RuntimeError, IndexError):
            return float("inf")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize(
    "kinds",
    [
        ("neurons",),
        ("kv_heads",),
        ("query_heads",),
        ("kv_heads", "query_heads"),
        ("layers",),
        KINDS,
        ("residual",),
        (*WIDTHS, "layers"),
        ("attentions",),
        ("mlps",),
        (*BLOCKS, *WIDTHS),
        (*BLOCKS, *WIDTHS, "layers"),
    ],
    ids="+".join,
)
def test_cut_equals_gated(layout: tuple[str, str], kinds: tuple[str, ...], ids: torch.Tensor) -> None:
    model = wide_norms(tiny_model(layout).double())
    axes = families.axes(model)
    mask = random_mask(axes, kinds, seed=1)
    with torch.no_grad():
        dense = model(ids).logits
        with gated(model, axes, mask):
            assert (model(ids).logits - dense).abs().max() > 1e-3 or not mask.kept, "the gates must do something"
        assert torch.equal(model(ids).logits, dense), "gates come off"
    assert gap(model, axes, mask, ids) <= 1e-9


def parameters_left(dense: Any, axes: Any, mask: Mask, stayed: list[int]) -> int:
    """Counted weight by weight: one that lies in no removed unit of any axis stays."""
    alive = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in dense.named_parameters()}
    for axis in axes:
        for unit in (~mask[axis.name]).nonzero().flatten().tolist() if axis.name in mask else ():
            for piece in axis.slices:
                at = piece.start + unit * piece.width
                alive[piece.parameter].transpose(0, piece.dim)[at : at + piece.width] = False
    dropped = set(range(len(dense.model.layers))) - set(stayed)
    return sum(int(a.sum()) for name, a in alive.items() if not any(f".layers.{i}." in name for i in dropped))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize("kinds", [KINDS, (*WIDTHS, "layers")], ids=["within layers", "and the stream"])
def test_sizes_and_config_follow_the_cut(kinds: tuple[str, ...], layout: tuple[str, str], ids: torch.Tensor) -> None:
    model = tiny_model(layout)
    axes = families.axes(model)
    mask = random_mask(axes, kinds, seed=2)
    dense = copy.deepcopy(model)
    cut(model, axes, mask)
    stayed = mask["layers"].nonzero().flatten().tolist()
    assert num_left(dense, axes, Mask({name: mask[name] for name in mask if name != "layers"})) == parameters_left(
        dense, axes, mask, [0, 1, 2]
    )
    assert count_parameters(model) == parameters_left(dense, axes, mask, stayed)
    width = int(mask.of(next(axis for axis in axes if axis.name == "residual")).sum())
    assert model.config.hidden_size == width == model.get_input_embeddings().embedding_dim == model.lm_head.in_features
    assert all(module.hidden_size == width for module in model.modules() if hasattr(module, "hidden_size"))
    assert model.config.num_hidden_layers == len(model.model.layers) == int(mask["layers"].sum())
    for i, layer in enumerate(model.model.layers):
        config = model.config.per_layer_config[i]
        now = {axis.kind: axis for axis in families.axes(model) if axis.layer == i}
        for kind, axis in now.items():
            assert (
                axis.gate.kind != "inputs" or model.get_submodule(axis.gate.module).in_features == axis.entries * axis.gate.width
            )
            assert all(getattr(config, field) == axis.entries * units for field, units in axis.fields), kind
            assert all(attrgetter(name)(model) == axis.size for name in axis.attributes), kind
            before = next(other.size for other in axes if other.kind == kind and other.layer is not None)
            assert axis.size == (before if before == 1 else before - max(1, before // 2)), kind
        assert layer.self_attn.num_key_value_groups == config.num_attention_heads // config.num_key_value_heads
        assert layer.self_attn.layer_idx == i
    prompt = ids[:1, :5]
    cached = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize(
    "gone", ["0.attentions", "0.mlps", "0.attentions 0.mlps 2.mlps", "0.attentions 1.attentions 2.attentions"]
)
def test_a_layer_does_without_its_attention_or_mlp(gone: str, layout: tuple[str, str], ids: torch.Tensor) -> None:
    """Its parameters are gone, norms too, and what is left generates as it reads: also where layer 0, whose cache tells how long a
    text is, has no attention, and where its window or that of another kind of layer is shorter than the text."""
    model = tiny_model(layout)
    dense, before = {axis.name: axis for axis in families.axes(model)}, count_parameters(model)
    names = {f"layers.{name}" for name in gone.split()}
    mask = Mask({name: torch.tensor([False]) for name in names})
    lost = {
        name for name, _ in model.named_parameters() if any(name.startswith(f"{m}.") for n in names for m in dense[n].modules)
    }
    left = num_left(model, tuple(dense.values()), mask)
    cut(model, tuple(dense.values()), mask)
    assert count_parameters(model) == left == before - sum(dense[name].cost for name in names)
    assert any("norm" in name for name in lost)
    assert not lost & {name for name, _ in model.named_parameters()}
    for i, config in enumerate(model.config.per_layer_config):
        assert set(getattr(config, "skip", ())) == {name.split(".")[2].removesuffix("s") for name in names if f".{i}." in name}
    now = {axis.name: axis for axis in families.axes(model)}
    assert now.keys() == {name for name, axis in dense.items() if not names & {name, *axis.enclosing}}
    assert not lost & {piece.parameter for axis in now.values() for piece in axis.slices}
    assert now["layers"].costs == tuple(count_parameters(layer) for layer in model.model.layers)
    options: Any = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids[:, :5], **options)
    assert torch.equal(cached, model.generate(ids[:, :5], use_cache=False, **options))
    assert torch.equal(cached, model.generate(ids[:, :5], cache_implementation="static", **options))
    if gone == "0.attentions":  # the test sees what it is for
        model.model.layers[0].self_attn.layer_idx = 1
        with suppress(RuntimeError, IndexError):
            assert not torch.equal(cached, model.generate(ids[:, :5], **options))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize("whole", [(), BLOCKS], ids=["within blocks", "and blocks"])
def test_optimizer_moments_shrink_along(layout: tuple[str, str], whole: tuple[str, ...], ids: torch.Tensor) -> None:
    """A step of Adam after the cut equals the step of the dense model whose gradients are gated, on the weights that stay."""
    model = tiny_model(layout).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    axes = families.axes(model)
    mask = random_mask(axes, ("kv_heads", "query_heads", "neurons", *whole), seed=4)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    cut(model, axes, mask, optimizer=optimizer)
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    twin_optimizer.zero_grad()
    with gated(twin, axes, mask):
        twin(ids, labels=ids).loss.backward()
    twin_optimizer.step()
    cut(twin, axes, mask)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_moments_follow_the_width_of_the_stream(layout: tuple[str, str], ids: torch.Tensor) -> None:
    """After a step the moments are those of the gated dense model, of gradients by the weights as they are scaled now."""
    model = wide_norms(tiny_model(layout).double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    axes = families.axes(model)
    residual = next(axis for axis in axes if axis.name == "residual")
    mask = random_mask(axes, ("residual",), seed=4)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.0)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cut(model, axes, mask, optimizer=optimizer)
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    twin_optimizer.zero_grad()
    with gated(twin, axes, mask):
        twin(ids, labels=ids).loss.backward()
    twin_optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        factor = (residual.size / int(mask["residual"].sum())) ** dict(residual.scaled).get(name, 0.0)
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = twin_optimizer.state[theirs][key]
            for piece in residual.slices:
                if piece.parameter == name:
                    expected = expected[mask["residual"]] if piece.dim == 0 else expected[:, mask["residual"]]
            assert torch.allclose(optimizer.state[ours][key] * factor**power, expected, rtol=1e-6, atol=1e-14), (name, key)


def test_dropped_layers_leave_the_optimizer(ids: torch.Tensor) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    cut(model, families.axes(model), Mask({"layers": torch.tensor([True, False, True])}), optimizer=optimizer)
    alive = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == alive
    assert {id(p) for p in optimizer.state} == alive


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_model()
    cut(model, families.axes(model), random_mask(families.axes(model), KINDS, seed=1))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_masks_compose(layout: tuple[str, str], ids: torch.Tensor) -> None:
    """Two cuts one after the other equal one cut by the composed mask, also when the first drops a layer."""
    twice, once = tiny_model(layout).double(), tiny_model(layout).double()
    dense_axes = families.axes(once)
    total = Mask()
    for seed, kinds in enumerate((KINDS, ("kv_heads", "query_heads", "neurons"))):
        axes = families.axes(twice)
        mask = random_mask(axes, kinds, seed=seed)
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    cut(once, dense_axes, total)
    assert torch.equal(once(ids).logits, twice(ids).logits)
    assert Mask.from_json(total.to_json()) == total


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_masks_of_the_stream_compose(layout: tuple[str, str], ids: torch.Tensor) -> None:
    twice, once = (wide_norms(tiny_model(layout).double()) for _ in range(2))
    dense_axes, total = families.axes(once), Mask()
    for seed, kinds in enumerate((("residual", "layers"), WIDTHS)):
        axes = families.axes(twice)
        mask = random_mask(axes, kinds, seed=seed)
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    cut(once, dense_axes, total)
    assert torch.allclose(once(ids).logits, twice(ids).logits, atol=1e-12)
    assert once.config.hidden_size == 12
    assert once.config.rms_norm_eps == pytest.approx(twice.config.rms_norm_eps, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_width_of_the_stream_in_float32(layout: tuple[str, str], ids: torch.Tensor) -> None:
    """With the stock norms, which round to float32 whatever they are given: a few 2⁻²⁴ a norm."""
    model = tiny_model(layout)
    axes = families.axes(model)
    assert gap(model, axes, random_mask(axes, ("residual",), seed=1), ids) <= 1e-4


@pytest.mark.parametrize(
    "order", [("K", "Q"), ("Q", "K"), ("KQ", "Q", "K"), ("Q", "KQ", "Q"), ("L", "K", "Q"), ("K", "L", "KQ")], ids="-".join
)
def test_masks_of_kv_heads_and_query_heads_compose_in_any_order(order: tuple[str, ...], ids: torch.Tensor) -> None:
    """Query heads lie inside KV heads: what a mask says of one changes what the next one counts of the other."""
    letters = {"K": "kv_heads", "Q": "query_heads", "L": "layers"}
    geometry = {"num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 8}
    twice, once = (tiny_model(**geometry).double() for _ in range(2))
    dense_axes, total = families.axes(once), Mask()
    for seed, kinds in enumerate(order):
        axes = families.axes(twice)
        mask = random_mask(axes, tuple(letters[kind] for kind in kinds), seed=seed)
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    with gated(once, dense_axes, total), torch.no_grad():
        assert (once(ids).logits - twice(ids).logits).abs().max() <= 1e-9
    cut(once, dense_axes, total)
    assert torch.equal(once(ids).logits, twice(ids).logits)
    for i, layer in enumerate(twice.model.layers):
        config = twice.config.per_layer_config[i]
        assert config.num_attention_heads * 8 == layer.self_attn.q_proj.out_features
        assert config.num_key_value_heads * 8 == layer.self_attn.k_proj.out_features


@pytest.mark.parametrize("order", ["A-K", "K-A", "AN-M-L", "L-AM-N", "N-M-LQ-A", "AMLKN-KQ", "A-L-A-L", "KQNR-AM-R"])
@pytest.mark.parametrize("layout", [("llama", "qwen2"), ("gemma3", "gemma3-grouped")], ids=lambda layout: layout[1])
def test_masks_of_blocks_compose_in_any_order(layout: tuple[str, str], order: str, ids: torch.Tensor) -> None:
    """Heads lie inside attention, neurons inside the MLP, all of it inside layers: names follow, and what is inside goes along."""
    letters = {
        "A": "attentions", "M": "mlps", "K": "kv_heads", "Q": "query_heads", "N": "neurons", "L": "layers", "R": "residual",
    }  # fmt: skip
    twice, once = (
        wide_norms(tiny_model(layout, num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3).double())
        for _ in range(2)
    )
    dense_axes, total = families.axes(once), Mask()
    for seed, kinds in enumerate(order.split("-")):
        axes = families.axes(twice)
        mask = random_mask(axes, tuple(letters[kind] for kind in kinds), seed=seed)
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    assert Mask.from_json(total.to_json()) == total == Mask().then(total, families.axes(twice))
    assert {name for name in total if total[name].any()} <= {axis.name for axis in dense_axes}
    with gated(once, dense_axes, total), torch.no_grad():
        assert (once(ids).logits - twice(ids).logits).abs().max() <= 1e-9
    cut(once, dense_axes, total)
    assert torch.allclose(once(ids).logits, twice(ids).logits, atol=1e-12)
    assert {axis.name: axis.size for axis in families.axes(once)} == {axis.name: axis.size for axis in families.axes(twice)}
    one, other = once.config.to_dict(), twice.config.to_dict()
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differing <= {"head_dim", "rms_norm_eps"}, "spelled out while there was attention; a product of two roundings"


def left_by(*masks: Mask) -> Any:
    """The axes of a tiny model that has lost what these masks say, one after the other."""
    model = tiny_model()
    for mask in masks:
        cut(model, families.axes(model), mask)
    return families.axes(model)


def test_a_mask_says_nothing_of_what_lies_in_a_block_that_is_gone() -> None:
    def then(first: Mask, later: Mask) -> Mask:
        return first.then(later, left_by(first, later))

    gone = Mask({"layers.1.attentions": torch.tensor([False]), "layers.1.mlps": torch.tensor([True])})
    heads = Mask({"layers.1.kv_heads": torch.arange(3) > 0, "layers.1.query_heads": torch.arange(6) % 2 > 0})
    assert set(then(heads, Mask({"layers.1.attentions": torch.tensor([False])}))) == {"layers.1.attentions"}
    for name, size in (("layers.1.kv_heads", 3), ("layers.1.query_heads", 6), ("layers.1.attentions", 1)):
        with pytest.raises(ValueError, match=f"later mask of '{name}' has {size} units, but 0 are left"):
            gone.then(Mask({name: torch.arange(size) >= 0}), left_by(gone))
    assert then(gone, Mask({"layers.1.neurons": torch.arange(40) > 3}))["layers.1.neurons"].sum() == 36
    neurons = {"layers.1.neurons": torch.arange(40) > 3, "layers.1.mlps": torch.tensor([False])}
    assert not then(gone, Mask(neurons))["layers.1.mlps"].any()
    assert set(then(gone, Mask(neurons))) == {"layers.1.attentions", "layers.1.mlps"}, "neurons of an MLP that goes with them"
    dropped = Mask({"layers": torch.tensor([False, True, True])})
    assert set(then(dropped, Mask({"layers.0.attentions": torch.tensor([False])}))) == {"layers", "layers.1.attentions"}
    assert set(then(gone, dropped)) == {"layers", "layers.1.attentions", "layers.1.mlps"}
    assert set(then(gone, Mask({"layers": torch.tensor([True, False, True])}))) == {"layers"}
    with pytest.raises(ValueError, match="the axes name 'layers.2.kv_heads', but the masks leave 2 layers"):
        Mask().then(dropped, left_by())


def test_an_axis_says_itself_what_it_lies_inside_and_whether_it_may_be_empty() -> None:
    """Names carry no meaning of their own: kinds that nobody has heard of nest as they say."""
    rooms = Axis("layers.0.rooms", 1, 1, Gate("x"), may_be_empty=True)
    desks = Axis("layers.0.desks", 2, 1, Gate("x"), enclosing=(rooms.name,))
    pens = Axis("layers.0.pens", 2, 1, Gate("x"), groups=2, enclosing=(desks.name, rooms.name))
    one_desk = Mask({desks.name: torch.tensor([True, False]), pens.name: torch.tensor([True, False, True, True])})
    assert one_desk.of(pens).tolist() == [True, False, False, False]
    assert Mask({rooms.name: torch.tensor([False])}).of(pens).tolist() == [False] * 4
    assert (rooms.least, desks.least, pens.layer, Axis("a.b.c", 1, 1, Gate("x")).layer) == (0, 1, 0, None)
    later = Mask({pens.name: torch.tensor([False, True])})
    whole = Mask({desks.name: torch.tensor([False, True])}).then(later, [rooms, desks, pens])
    assert whole[pens.name].tolist() == [False, False, False, True]
    Mask({rooms.name: torch.tensor([False])}).check([rooms, desks])
    with pytest.raises(ValueError, match="mask of 'layers.0.desks' keeps nothing; at least one of its 2 units must stay"):
        Mask({desks.name: torch.tensor([False, False])}).check([rooms, desks])
    with pytest.raises(ValueError, match="'layers.0.pens' has 3 units, not as many in each of 2 layers.0.desks"):
        Mask({desks.name: torch.tensor([True, False])}).of(replace(pens, size=3, groups=1))


def test_a_unit_that_has_to_stay_stays() -> None:
    """Such as the last layer with attention of Qwen3.5, whatever its score."""
    layers = Axis("layers", 4, 1, Gate("x", kind="whole"), stays=(3,))
    best = Mask.of_sizes([layers], {"layers": torch.tensor([4.0, 3.0, 2.0, 1.0])}, {"layers": 2})
    assert best["layers"].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="mask of 'layers' removes unit 3, without which the model does not run"):
        Mask({"layers": torch.tensor([True, True, True, False])}).check([layers])


def test_every_group_must_lose_as_many_query_heads() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    keep = torch.tensor([True, False, True, True, True, True])
    with pytest.raises(
        ValueError, match=r"layers.0.query_heads' keeps \[1, 2\] units of its groups; every group must keep the same"
    ):
        cut(model, families.axes(model), Mask({"layers.0.query_heads": keep, "layers.0.neurons": torch.arange(40) < 9}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing is changed"
    # a KV head that goes takes its query heads along, whatever is said of them
    cut(model, families.axes(model), Mask({"layers.0.query_heads": keep, "layers.0.kv_heads": torch.tensor([False, True, True])}))
    assert model.model.layers[0].self_attn.q_proj.out_features == 4 * 8


def test_query_heads_are_ranked_within_their_group() -> None:
    axis = next(axis for axis in families.axes(tiny_model()) if axis.name == "layers.1.query_heads")
    assert (axis.size, axis.groups, axis.entries) == (2, 3, 6)
    scores = {axis.name: torch.tensor([9.0, 8.0, 1.0, 2.0, 7.0, 7.0])}
    mask = Mask.of_sizes([axis], scores, {axis.name: 1})
    assert mask[axis.name].tolist() == [True, False, False, True, True, False], "the best of each, and of equals the first"


def test_masks_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    axes = families.axes(model)
    with pytest.raises(ValueError, match="not an axis"):
        cut(model, axes, Mask({"layers.9.neurons": torch.tensor([True, False])}))
    with pytest.raises(ValueError, match="has 2 units, the model has 40"):
        cut(model, axes, Mask({"layers.0.neurons": torch.tensor([True, False])}))
    nothing = torch.zeros(40, dtype=torch.bool)
    with pytest.raises(ValueError, match="keeps nothing"):
        cut(model, axes, Mask({"layers.0.neurons": nothing}))
    with pytest.raises(ValueError, match="keeps nothing"), gated(model, axes, Mask({"layers.0.neurons": nothing})):
        pass
    with pytest.raises(ValueError, match="keeps nothing"):
        Mask.of_sizes([axes[0]], {axes[0].name: torch.ones(axes[0].entries)}, {axes[0].name: 0})
    with pytest.raises(ValueError, match="2 units, but 3 are left"):
        Mask({"layers": torch.tensor([True] * 3)}).then(Mask({"layers": torch.tensor([True, False])}), axes)
    with pytest.raises(ValueError, match="must be a 1-D bool tensor, not torch.float32"):
        Mask({"layers": torch.ones(3)})
    with pytest.raises(ValueError, match="not a mask"):
        Mask.from_json({"format": 1, "axes": {"layers": {"size": 2, "kept": [5]}}})
    for axis in ({"size": 2, "kept": [-1]}, {"size": -2, "kept": []}, {"size": 2**60, "kept": []}, {"size": "2", "kept": [0]}):
        with pytest.raises(ValueError, match="not a mask"):
            Mask.from_json({"format": 1, "axes": {"layers": axis}})
    with pytest.raises(ValueError, match="format 2"):
        Mask.from_json({"format": 2, "axes": {}})
