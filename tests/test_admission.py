"""Model types that no family file names: the law admits the kinds of axes that hold, and the results load and save like all others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig
from typer.testing import CliRunner

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import can_save_unequal_layers
from adapt_pruner.core.events import Loaded
from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.anatomy import anatomy
from adapt_pruner.export.loading import GGUF_TYPES
from adapt_pruner.families import admission, convention
from conftest import VOCAB

INSIDE = ("neurons", "kv_heads", "query_heads", "attentions", "mlps")
WHOLE = ("residual", "vocabulary", "layers")
OF_HEADS = ("neurons", "kv_heads", "attentions", "mlps")  # where each head has its own keys
ADMITTED = {
    "granite": {*INSIDE, *WHOLE},  # multipliers of embeddings, blocks, logits
    "glm4": {*INSIDE, *WHOLE},  # four norms, gate and up in one matrix
    "cohere2": {*INSIDE, "vocabulary", "layers"},  # both blocks read one norm, which subtracts a mean
    "olmo2": {"neurons", "attentions", "mlps", *WHOLE},  # norms over all heads; blocks read the stream itself
    "exaone4": {*INSIDE, *WHOLE},  # norms inside heads, and blocks that read the stream itself
    "gpt2": {*OF_HEADS, "vocabulary", "layers"},  # weights the other way round; its constructor derives the size of heads
    "gpt_neox": {*OF_HEADS, "vocabulary", "layers"},  # queries, keys and values head by head; parallel blocks
    "deepseek_v3": {*OF_HEADS, "experts", "vocabulary", "layers"},  # keys and values from a vector that all heads share
    "minicpm3": {*OF_HEADS, "vocabulary"},  # blocks are scaled by the number of layers, logits by the width of the stream
    "gpt_oss": {*INSIDE, "experts", "vocabulary", "layers"} - {"neurons", "mlps"},  # sinks; experts that give two outputs
    "qwen3_5_text": {*INSIDE, *WHOLE},  # linear attention stays; queries come with gates
    "helium": {*INSIDE, *WHOLE},  # its constructor derives the size of heads
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path_factory.getbasetemp() / "admission"))


@pytest.mark.parametrize("kind", ADMITTED)
def test_the_law_admits_the_axes_that_hold(kind: str) -> None:
    verdict = admission.verdict_of(AutoConfig.for_model(kind))
    assert set(verdict.admitted) == ADMITTED[kind], verdict.refused
    assert verdict.refused.keys() >= {*INSIDE, *WHOLE} - ADMITTED[kind] - {"query_heads"}


def test_a_wrong_declaration_is_not_admitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sink that stays when its head goes; a norm that stays when its block goes; a bias that is forgotten."""
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path))
    monkeypatch.setattr(admission, "_VERDICTS", {})
    monkeypatch.setattr(convention, "_of_query_heads", lambda attention: convention._linear(attention, "q_proj"))
    assert "kv_heads" in admission.verdict_of(AutoConfig.for_model("gpt_oss")).refused
    rows = convention._rows
    monkeypatch.setattr(convention, "_rows", lambda *where, **how: rows(*where, **how)[:1])
    starcoder = admission.verdict_of(AutoConfig.for_model("starcoder2")).refused
    assert "neurons" in starcoder, starcoder


def test_a_verdict_is_the_same_after_a_cut_and_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    first = admission.verdict_of(AutoConfig.for_model("granite"))

    def never(tiny: Any) -> Any:
        raise AssertionError("found on disk")

    monkeypatch.setattr(admission, "_VERDICTS", {})
    monkeypatch.setattr(admission, "_tried", never)
    model = _model("granite")
    axes = families.axes(model)
    assert {axis.kind for axis in axes} == set(first.admitted)
    cut(model, axes, admission.random_mask([axis for axis in axes if axis.kind in ("neurons", "kv_heads", "residual")], seed=3))
    assert admission.verdict_of(model.config) == first


def _model(kind: str) -> Any:
    config = admission.shrunk(AutoConfig.for_model(kind))
    config.vocab_size = VOCAB
    return admission.tiny_model(config).float()


@pytest.mark.parametrize("kind", ["granite", "cohere2"])
def test_losses_go_through_what_a_family_does_to_logits(kind: str) -> None:
    model = _model(kind)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        assert float(CAUSAL_LM.loss(model, ids)) == pytest.approx(
            float(cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")), 1e-5
        )


@pytest.mark.parametrize(("kind", "params"), [("glm4", "70%"), ("deepseek_v3", "87%")])
def test_pruned_with_unequal_layers_saved_loaded_and_asked(kind: str, params: str, tmp_path: Path, tokenizer: Any) -> None:
    """Our generic class builds what a cut has left, and it writes the same with and without a cache.

    GLM-4 has four norms and fused MLPs, DeepSeek-V3 latent attention and experts that transformers would write one by one.
    """
    model = _model(kind)
    assert can_save_unequal_layers(model)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    result = ap.prune(
        model, tokenizer=tokenizer, params=params, text=text, output=tmp_path / "out", calibration_samples=4, calibration_length=32,
        progress=False, settings={"step": 0.1}, method="adapt-pruner",
    )  # fmt: skip
    loaded = load(str(tmp_path / "out")).model
    assert result.figures["params_after"] == sum(parameter.numel() for parameter in loaded.parameters())
    left = families.sizes(loaded)
    assert {left[name] for name in left if name.endswith("neurons")} != {40}
    assert any(left[axis.name] < axis.size for axis in families.axes(model) if axis.kind == "kv_heads" and axis.name in left)
    ids = torch.tensor([[5, 9, 14, 7]])
    written = [loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)
    mask, axes = result.mask, families.axes(model)
    with torch.no_grad(), gated(model, axes, mask):
        shut = model(ids).logits
    assert torch.allclose(shut, loaded(ids).logits, atol=1e-3)


def test_a_line_says_what_was_found() -> None:
    assert families.summary(AutoConfig.for_model("llama")) is None
    said = families.summary(AutoConfig.for_model("olmo2"))
    assert said == "neurons, attentions, mlps, residual, vocabulary, layers may shrink (checked); kv_heads, query_heads stay"
    assert Loaded(model="m", params=2_000_000, may_shrink=said).line() == f"loaded m: 2.0 M parameters; {said}"


def test_what_is_not_admitted_is_refused_in_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    model = _model("olmo2")
    with pytest.raises(UsageError, match="axes names kv_heads, which this model does not have"):
        _prune(model, tokenizer, tmp_path / "heads", axes=["kv_heads"])
    _prune(model, tokenizer, tmp_path / "both", axes=["neurons", "kv_heads"])
    after = load(str(tmp_path / "both")).model.model.layers
    assert all(layer.self_attn.q_proj.out_features == 48 for layer in after), "heads stay"
    with pytest.raises(UsageError, match=r"model of type 'bert' .*see docs/extending.md"):
        families.axes(_bare("bert"))


def _bare(kind: str) -> Any:
    model: Any = torch.nn.Module()
    model.config = AutoConfig.for_model(kind)
    return model


def _prune(model: Any, tokenizer: Any, out: Path, *, axes: list[str]) -> None:
    text = out.with_suffix(".txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    ap.prune(
        model, tokenizer=tokenizer, params="90%", text=text, output=out, calibration_samples=4, calibration_length=32, progress=False,
        settings={"axes": axes, "step": 1},
    )  # fmt: skip


def test_an_axis_of_a_layer_with_experts_or_linear_attention_is_left_out() -> None:
    kinds: dict[int, set[str]] = {}
    axis: Axis
    for axis in families.axes(_model("qwen3_5_text")):
        if axis.layer is not None:
            kinds.setdefault(axis.layer, set()).add(axis.kind)
    assert kinds[0] == {"neurons", "mlps"}
    assert kinds[3] == {*INSIDE}


def test_layers_with_experts_may_differ_in_heads() -> None:
    """Experts go alike of every layer, so that layers with different numbers of them need not load again."""
    assert can_save_unequal_layers(_model("mixtral"))


@pytest.mark.parametrize(
    ("kind", "experts"), [("mixtral", [(8, 40)] * 3), ("gpt_oss", [(8, 40)] * 3), ("deepseek_v3", [(0, 0), (8, 24), (8, 24)])]
)
def test_a_layer_says_how_many_experts_it_has_and_how_wide_they_are(kind: str, experts: list[tuple[int, int]]) -> None:
    layers = anatomy(_model(kind))["layers"]
    assert [(layer["experts"], layer["expert_neurons"]) for layer in layers] == experts


def test_the_table_of_types_answers_by_name() -> None:
    """From the command line and on the page: GGUF is a yes only for types of which a file passed `verify` in llama.cpp."""
    from adapt_pruner.cli import app

    listed = CliRunner().invoke(app, ["models", "gpt-neox"])
    assert listed.exit_code == 0, listed.output
    assert all(word in listed.output for word in ("gpt_neox", "GGUF"))
    types = families.checked()
    assert {"llama"} <= {kind for kind, row in types.items() if row["gguf"]} <= GGUF_TYPES.keys()
    assert sum({"neurons", "kv_heads"} <= set(row["axes"]) for row in types.values()) >= 50
    assert sum({"layers", "vocabulary"} <= set(row["axes"]) for row in types.values()) >= 90
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(name in page for name in ("Mixtral", "granite", "MLX", "Pythia", "GPT-2", "DeepSeek", *types))
