"""Experts: the law for every type that has them, folders that stock transformers loads, scores by hand, and the command line."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import adapt_pruner as ap
from adapt_pruner.compare.request import Request
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated, num_active, num_left
from adapt_pruner.errors import UsageError
from adapt_pruner.families import admission, convention
from adapt_pruner.families.experts import experts
from adapt_pruner.score import experts as scores
from adapt_pruner.score.calibrate import score
from conftest import VOCAB, tiny_moe
from test_cli import call

TYPES = (
    "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe", "minimax_m2", "qwen3_5_moe_text", "qwen3_next", "ernie4_5_moe", "qwen2_moe",
)  # fmt: skip
IDS = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path_factory.getbasetemp() / "admission"))


def tiny(kind: str, **changes: Any) -> Any:
    config = admission.shrunk(AutoConfig.for_model(kind))
    for name, value in {"vocab_size": VOCAB, **changes}.items():
        setattr(config, name, value)
    return admission.tiny_model(config)


def of_experts(model: Any) -> list[Axis]:
    return [axis for index, layer in enumerate(model.model.layers) for axis in experts(model, "model.layers", index, layer)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), admission.Wide():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", TYPES)
def test_experts_that_are_shut_equal_experts_that_are_gone_and_stock_code_loads_the_rest(kind: str, tmp_path: Path) -> None:
    """The router's rows, its bias, the bias of its choice and every tensor of experts follow; so does the number in the config."""
    model = tiny(kind)
    axes, whole = of_experts(model), logits(model)
    assert axes, "no layer has experts"
    mask = admission.random_mask(axes, seed=1)
    with gated(model, axes, mask):
        shut = logits(model)
    assert torch.equal(logits(model), whole), "the model is left as found"
    assert not torch.allclose(shut, whole)
    smaller = copy.deepcopy(model)
    cut(smaller, convention.axes(smaller), mask)
    assert float((logits(smaller) - shut).abs().max()) <= 1e-9
    assert count_parameters(smaller) == num_left(model, axes, mask) < count_parameters(model)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()
    assert {layer_axis.entries for layer_axis in of_experts(again)} == {int(mask[axis.name].sum()) for axis in axes}
    assert torch.allclose(logits(again), shut, atol=1e-4)  # positions of a model that is loaded are float32


def test_groups_keep_as_many_each_and_fewer_than_a_token_needs_are_refused() -> None:
    axis = of_experts(tiny("glm4_moe"))[0]
    assert (axis.groups, axis.size, axis.least, axis.per_token) == (2, 4, 2, 2)
    axis = of_experts(tiny("qwen3_moe"))[0]
    assert (axis.groups, axis.size, axis.least) == (1, 8, 2)
    with pytest.raises(ValueError, match=r"keeps 1 of 8 units; at least 2 must stay, since a token needs them"):
        Mask({axis.name: torch.arange(8) < 1}).check([axis])


def test_active_parameters_are_those_of_the_experts_that_a_token_goes_through() -> None:
    model = tiny("qwen3_moe")
    axes = of_experts(model)
    idle = sum(6 * tensor[0].numel() for layer in model.model.layers for tensor in layer.mlp.experts.parameters())
    assert num_active(model, axes) == count_parameters(model) - idle
    before, mask = num_active(model, axes), admission.random_mask(axes, seed=1)
    foreseen = num_active(model, axes, mask)
    cut(model, convention.axes(model), mask)
    rows = len(axes) * 4 * model.config.hidden_size  # of the router
    assert num_active(model, of_experts(model)) == foreseen == before - rows


def by_hand(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """REAP's score of each expert of the first layer, and how often it is chosen: token by token, from the weights."""
    block: Any = model.model.layers[0].mlp
    entering: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: entering.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    worth, times = torch.zeros(8), torch.zeros(8)
    for x in entering[0]:
        shares = (block.gate.weight @ x).softmax(0)
        best = shares.topk(2)
        for expert, share in zip(best.indices.tolist(), best.values / best.values.sum(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
            given = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            worth[expert] += (share * given.norm()).detach()
            times[expert] += 1
    return worth / times.clamp_min(1), times / len(entering[0])


def test_reap_and_frequency_equal_the_same_by_hand() -> None:
    model = tiny("qwen3_moe", norm_topk_prob=True).float()
    axes, batches = of_experts(model), [IDS[:2], IDS[2:]]
    worth, often = by_hand(model)
    found, loss = score(model, axes, batches, metrics=[scores.reap, scores.usage], dtype="float32")
    assert math.isfinite(loss)
    assert torch.allclose(found["layers.0.experts"], worth, rtol=1e-4)
    assert torch.allclose(found["layers.0.experts.used"], often)
    assert torch.equal(score(model, axes, batches, metrics=[scores.frequency], dtype="float32")[0]["layers.0.experts"], often)


@pytest.fixture
def moe(tmp_path: Path, tokenizer: Any) -> Path:
    model = tiny_moe()
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return tmp_path / "moe"


def test_prune_inspect_and_the_plan_say_what_is_stored_and_what_is_active(
    moe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every layer keeps the same number, those of the best scores; stock transformers loads the folder."""
    out, text = moe.parent / "out", moe.parent / "text.txt"
    calibration = ("--calibration", text, "--calibration-samples", 4, "--calibration-length", 32)
    code, said, _ = call(
        monkeypatch, capsys, "prune", moe, "-o", out, "--method", "reap", "--params", "75% of experts", *calibration
    )
    assert code == 0
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert {len(layer.mlp.gate.weight) for layer in stock.model.layers} == {6}
    active = num_active(stock, of_experts(stock))
    assert f"{active:,}" in said
    assert "adapt-pruner chat" in said
    assert "--to gguf" not in said, "no command that would be refused"
    code, said, _ = call(monkeypatch, capsys, "inspect", out, "--text", text, "--json")
    layers = json.loads(said)["layers"]
    assert [layer["experts"] for layer in layers] == [6, 6, 6]
    assert all(sum(layer["used"]) == pytest.approx(2, abs=1e-5) for layer in layers), "a token goes through two"
    code, said, _ = call(monkeypatch, capsys, "inspect", out)
    assert f"{active:,} parameters are active in a token" in said
    assert "experts" in said.splitlines()[0]
    shutil.copytree(moe, paper := moe.parent / "paper", ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = moe.parent / "recipe.yaml"
    recipe.write_text(
        f"{{model: {paper}, method: reap, budget: 75% of experts, calibration: {{source: {text}, samples: 4, length: 32}}}}"
    )
    code, said, _ = call(monkeypatch, capsys, "run", recipe, "--dry-run")
    assert f"→ about {active:,}" in said


def test_what_cannot_be_is_refused_in_one_sentence(moe: Path, tokenizer: Any, tmp_path: Path) -> None:
    options = {
        "text": moe.parent / "text.txt",
        "calibration_samples": 4,
        "calibration_length": 32,
        "progress": False,
        "method": "reap",
    }
    with pytest.raises(
        UsageError, match=r"is too small: [\d,]+ parameters remain when allocate.uniform has removed all it can \(experts\)"
    ):
        ap.prune(moe, params="20% of experts", output=tmp_path / "few", **options)
    with pytest.raises(UsageError, match=r"metric 'experts.reap' gives no scores for kv_heads"):
        ap.prune(moe, params="90%", output=tmp_path / "heads", settings={"axes": ["experts", "kv_heads"]}, **options)


def test_the_page_shows_experts_by_layer_and_how_often_each_was_used(moe: Path, tmp_path: Path) -> None:
    result = ap.prune(
        moe, params="50% of experts", output=tmp_path / "half", text=moe.parent / "text.txt", calibration_samples=4, calibration_length=32,
        progress=False, method="frequency",
    )  # fmt: skip
    page = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "50% of the experts went" in page
    assert "How often each expert was used" in page
    assert "active in a token" in page
    assert result.figures["active_params_before"] > result.figures["active_params_after"]
    assert Mask(result.mask.kept).num_removed() == 3 * 4


def test_compare_takes_shares_of_experts_and_gives_all_methods_the_same_axes() -> None:
    request = Request(
        model="m", methods=("reap", "frequency", "random"), params=("75% of experts", "50% of experts"), texts=("t",), overrides=("axes=[experts]",)
    ).checked()  # fmt: skip
    cells = request.cells(1000, 800, 400)
    assert {cell.size for cell in cells} == {900, 800}
    assert {cell.recipe.axes for cell in cells} == {("experts",)}
    with pytest.raises(UsageError, match="is a share of experts, and this model has none"):
        request.cells(1000, 800)
