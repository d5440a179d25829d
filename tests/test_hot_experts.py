"""Evaluation with experts on the shelf: the same figures, only routed experts read, the ones used last kept."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.checkpoint.load import load, load_that_fits
from adapt_pruner.checkpoint.shelved import places
from adapt_pruner.core.model.hot_experts import Hot, one_by_one
from adapt_pruner.core.model.shelf import Shelved, Source, is_shelved, on_shelf
from adapt_pruner.errors import UsageError
from adapt_pruner.grow import with_experts
from conftest import VOCAB, byte_tokenizer, saved, tiny_model
from test_cli import call

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def moe_of(kind: str) -> Any:
    """Mixtral or Qwen3-MoE, as grown, with experts that differ."""
    model = with_experts(tiny_model(("llama", kind), vocab_size=VOCAB), 8, 2)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(3)) * 4)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / request.param, moe_of(request.param), byte_tokenizer())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "mixtral", moe_of("llama"), byte_tokenizer())


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_experts_on_the_shelf_give_the_same_figures(place: str, mixtral: Path, text_file: Path) -> None:
    measured = {"text": str(text_file), "window": 32, "max_windows": 6, "dtype": "float32"}
    inside, shelved = (ap.evaluate(str(mixtral), offload=where, **measured) for where in ("none", place))
    assert inside.experts is None
    assert shelved.nll == pytest.approx(inside.nll, abs=1e-6)
    assert (shelved.params, shelved.nonzero) == (inside.params, inside.nonzero)
    assert shelved.experts is not None
    assert shelved.experts["share"] > 0.5, "speed is measured on a text that was just read"
    assert 0 < shelved.experts["read_bytes"] <= shelved.weight_bytes


def test_only_the_experts_that_a_router_chooses_are_read_and_those_used_last_stay(folder: Path) -> None:
    whole = load(str(folder)).model
    whole.config._experts_implementation = "eager"
    loaded = load_that_fits(str(folder), offload="disk", only_read=True)
    model, axes = loaded.model, families.declared(loaded.model)
    of_layers = [axis for axis in axes if axis.per_token]
    chosen: dict[int, set[int]] = {}
    for index, layer in enumerate(whole.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda module, args, output, index=index: chosen.setdefault(index, set()).update(output[2].flatten().tolist())
        )
    with torch.no_grad():
        expected = whole(IDS[:1, :3]).logits
    before = [name for name, _ in model.named_parameters()]
    with torch.no_grad(), one_by_one(model, axes, room=2**30) as hot:
        found = model(IDS[:1, :3]).logits
        first, read_bytes = hot.misses, hot.read_bytes
        again = model(IDS[:1, :3]).logits
    assert torch.equal(found, again)
    assert torch.allclose(found, expected, atol=1e-5)
    assert first == 2 * sum(map(len, chosen.values())) < 2 * sum(axis.size for axis in of_layers), (
        "two tensors of each that was chosen"
    )
    an_expert = sum(tensor[0].numel() for tensor in whole.model.layers[0].mlp.experts.parameters())
    needed = 4 * an_expert * sum(map(len, chosen.values()))
    assert needed <= read_bytes <= hot.read_bytes <= needed + (hot.guesses - hot.right) * 4 * an_expert
    assert hot.misses == first, "what was read once is there the second time"
    assert hot.hits >= first
    assert [name for name, _ in model.named_parameters()] == before
    assert is_shelved(model)
    assert not any(weight.here for weight in on_shelf(model) if isinstance(weight, Shelved))

    with torch.no_grad(), one_by_one(model, axes, room=0) as tight:
        assert torch.equal(model(IDS[:1, :3]).logits, found)
        assert torch.equal(model(IDS[:1, :3]).logits, found)
    assert tight.misses > hot.misses, "nothing but the expert at work stays"
    assert tight.most_bytes < hot.most_bytes
    assert tight.read_bytes > hot.read_bytes


def test_experts_of_the_next_layer_are_read_before_its_router_has_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_that_fits(str(folder), offload="disk", only_read=True)
    order: list[tuple[str, int]] = []
    expect, submit = Hot.expect, ThreadPoolExecutor.submit

    def expected(hot: Hot, keys: list[tuple[str, int]], *rest: Any, **options: Any) -> None:
        order.append(("router of", int(keys[0][0].split(".")[2])))
        expect(hot, keys, *rest, **options)

    def submitted(pool: ThreadPoolExecutor, work: Any, *keys: tuple[str, int]) -> Any:
        order.extend(("read", int(name.split(".")[2])) for name, _ in keys)
        return submit(pool, work, *keys)

    monkeypatch.setattr(Hot, "expect", expected)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitted)
    with torch.no_grad(), one_by_one(loaded.model, families.declared(loaded.model), room=0) as hot:
        loaded.model(IDS[:1, :1])
    assert ("read", 1) in order[: order.index(("router of", 1))]
    assert 0 < hot.right <= hot.guesses
    last = len(loaded.model.model.layers) - 1
    assert hot.guesses == 2 * 2 * last, "two experts of two tensors for each layer but the first"


def test_the_command_line_says_how_many_were_in_memory(
    mixtral: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", mixtral, "--text", text_file, "--window", 32, "--max-windows", 4, "--offload")
    status, out, _ = call(monkeypatch, capsys, *words, "disk")
    assert status == 0
    assert "were in memory when they were needed, the others took" in out
    _, out, _ = call(monkeypatch, capsys, *words, "disk", "--json")
    assert json.loads(out)["experts"]["hits"] > 0
    status, _, err = call(monkeypatch, capsys, *words, "dish")
    assert status == 2
    assert "--offload 'dish' is not known; did you mean 'disk'?" in err


def test_a_run_that_changes_weights_still_refuses_experts_that_lie_apart(folder: Path) -> None:
    with pytest.raises(UsageError, match="so its weights cannot be read one by one; set offload=none"):
        load_that_fits(str(folder), offload="disk")


def test_of_a_tensor_with_all_experts_only_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(5 * 4 * 6, dtype=torch.float32).view(5, 4, 6)
    save_file({"other": torch.ones(7), "experts": whole}, tmp_path / "model.safetensors")
    place, sizes = places(tmp_path / "model.safetensors")["experts"], []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda source, offset, size: sizes.append(size) or read(source, offset, size))
    assert torch.equal(place.at({0: torch.tensor([3])}).read(), whole[3:4])
    assert torch.equal(place.at({2: torch.tensor([1, 5])}).at({0: torch.tensor([4])}).read(), whole[4:5, :, [1, 5]])
    assert sizes == [4 * 6 * 4] * 2
    assert torch.equal(place.at({0: torch.tensor([1, 3])}).read(), whole[[1, 3]])
