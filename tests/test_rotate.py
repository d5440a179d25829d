"""SliceGPT: rotating changes nothing, slicing is projecting, the count is the count, and the checkpoint is anybody's to load."""

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load, load_shapes
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import anatomy, decoder_parameters
from adapt_pruner.recipe import Recipe, parts, read
from adapt_pruner.reduce import slice as slicing
from adapt_pruner.reduce.slice import SliceGPT, directions, principal_directions, rotate, slice_to, sliced_parameters, width_for
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import training as run_training
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.work import Work
from conftest import LAYOUTS as ALL
from conftest import VOCAB, as_dicts, byte_tokenizer, in_two_processes, read_json, suited, tiny_config, tiny_model
from test_checkpoint import loaded_by_a_stranger, pruned

LAYOUTS = [layout for layout in ALL if tiny_config(layout).model_type not in ("gemma3_text", "phi3")]
"""Norms after attention and MLP forbid it to Gemma; matrices of Phi-3 are several in one, which `rotate` does not know."""
WIDTH = 32  # of 48


@pytest.mark.parametrize("layout", [("gemma3", "gemma3"), ("phi3", "phi3")], ids=lambda layout: layout[1])
def test_a_model_that_cannot_be_sliced_is_refused(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    with pytest.raises(
        UsageError, match=f"{type(model).__name__} cannot be sliced, since there is no sliced class for it; known: Llama"
    ):
        floor_of(model)


def floor_of(model: Any) -> tuple[int, str]:
    """The parameters that are left with the narrowest stream, and when."""
    return SliceGPT().floor(Work.of(model, read({"method": "slicegpt", "budget": "50%"})))


def exact(model: Any) -> Any:
    """The model in float64 all through: stock norms would compute in float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)
    return model


def some_ids(seed: int = 0, *, rows: int = 3) -> Tensor:
    return torch.randint(3, 97, (rows, 24), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def sliced(layout: tuple[str, str] = ("llama", "llama"), width: int = WIDTH, **changes: Any) -> Any:
    model = tiny_model(layout, **changes)
    slice_to(model, width, [some_ids(1), some_ids(2)], dtype="float32")
    return model


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_with_all_directions_nothing_changes(layout: tuple[str, str]) -> None:
    dense = exact(tiny_model(layout))
    model = copy.deepcopy(dense)
    slice_to(model, 48, [some_ids(1)], dtype="float32")
    assert (logits(exact(model), some_ids()) - logits(dense, some_ids())).abs().max() < 1e-8


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_any_orthogonal_bases_change_nothing(layout: tuple[str, str]) -> None:
    dense = exact(tiny_model(layout))
    model = copy.deepcopy(dense)
    slice_to(model, 48, [some_ids(1)], dtype="float32")
    generator = torch.Generator().manual_seed(3)
    bases = [torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator)).Q for _ in range(6)]
    rotate(dense, model, bases)
    assert (logits(exact(model), some_ids()) - logits(dense, some_ids())).abs().max() < 1e-8


class Projecting:
    """The dense model with x ← x P before each block: what slicing means, with nothing rotated and nothing narrower."""

    def __init__(self, model: Any) -> None:
        self.projections: list[Tensor] = []
        self.seen: list[list[Tensor]] = []
        self.model = model
        for index, layer in enumerate(model.model.layers):
            layer.forward = MethodType(self.layer(index), layer)

    def at(self, block: int, x: Tensor) -> Tensor:
        self.seen[block].append(x)
        return x @ self.projections[block] if block < len(self.projections) else x

    def layer(self, index: int) -> Any:
        def forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            x = self.at(2 * index, hidden_states)
            x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
            x = self.at(2 * index + 1, x)
            return x + layer.mlp(layer.post_attention_layernorm(x))

        return forward

    def read(self, ids: Tensor) -> Tensor:
        self.seen = [[] for _ in range(6)]
        return logits(self.model, ids)

    def find(self, ids: Tensor, width: int) -> None:
        """One pass over everything for each block, singular vectors of the signals themselves."""
        for block in range(6):
            self.read(ids)
            x = torch.cat(self.seen[block]).reshape(-1, 48)
            normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            right = torch.linalg.svd(normed, full_matrices=False).Vh[:width]
            self.projections.append(right.T @ right)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_slicing_is_projecting_before_every_block(layout: tuple[str, str]) -> None:
    dense = exact(tiny_model(layout))
    model = copy.deepcopy(dense)
    slice_to(model, WIDTH, list(some_ids(1, rows=4).split(2)), dtype="float32")
    assert model.model.embed_tokens.weight.shape[1] == model.model.layers[1].self_attn.q_proj.weight.shape[1] == WIDTH
    slow = Projecting(dense)
    slow.find(some_ids(1, rows=4), WIDTH)
    expected = slow.read(some_ids())
    assert (logits(exact(model), some_ids()) - expected).abs().max() < 1e-8
    slow.projections.clear()
    assert (slow.read(some_ids()) - expected).abs().max() > 0.01, "and something was lost"


def test_the_first_directions_hold_most_of_the_signal() -> None:
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 2, 5, 0, 3])
    found = principal_directions(x.T @ x, 3)
    assert torch.allclose(found.T @ found, torch.eye(3, dtype=torch.float64))
    rest = (x - x @ found @ found.T).square().sum()
    best = min(x[:, [i for i in range(6) if i not in kept]].square().sum() for kept in itertools.combinations(range(6), 3))
    assert rest <= best
    with pytest.raises(RunError, match="not finite; the model's weights are damaged"):
        principal_directions(torch.full((2, 2), float("nan"), dtype=torch.float64), 1)


def test_collecting_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before = logits(model, some_ids())
    found = list(directions(model, [some_ids(1)], WIDTH, dtype="auto"))
    assert [basis.shape for basis in found] == [(48, WIDTH)] * 6
    assert torch.equal(logits(model, some_ids()), before)
    with pytest.raises(IndexError):
        list(directions(model, [torch.full((1, 4), 1000)], WIDTH, dtype="auto"))
    assert torch.equal(logits(model, some_ids()), before)


def test_two_processes_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_model().double(), [some_ids(1), some_ids(2), some_ids(4)]

    def first() -> Tensor:
        return next(directions(model, batches, WIDTH, dtype="float32"))

    alone, together = first(), in_two_processes(monkeypatch, first)
    assert torch.allclose(alone @ alone.T, together @ together.T, atol=1e-8)


def test_biases_that_a_repair_has_made_are_turned() -> None:
    model = tiny_model()
    model.config.output_bias = True
    for layer in model.model.layers:
        for block, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            weight = getattr(block, name).weight
            setattr(block, name, torch.nn.Linear(weight.shape[1], weight.shape[0]))
    before = logits(model, some_ids())
    counted = sliced_parameters(model, 48)
    slice_to(model, 48, [some_ids(1)], dtype="float32")
    assert torch.allclose(logits(model, some_ids()), before, atol=1e-4)
    assert count_parameters(model) == counted


# Counting


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_count_is_that_of_the_model_made(layout: tuple[str, str]) -> None:
    for width in (8, 24, 40):
        model = tiny_model(layout)
        counted = sliced_parameters(model, width)
        slice_to(model, width, [some_ids(1)], dtype="float32")
        assert count_parameters(model) == counted


def test_the_counts_of_the_authors_code() -> None:
    """SmolLM2-135M at the three sizes that the authors' code was run at: untied, shortcuts counted, head whole."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert count_parameters(model) == 134_515_008
    for width, count in ((408, 133_882_560), (312, 107_483_328), (216, 82_171_584)):
        assert sliced_parameters(model, width) == count
        assert (width_for(model, count), width_for(model, count - 1)) == (width, width - 8)


def test_the_floor_is_what_the_narrowest_stream_leaves() -> None:
    model = tiny_model()
    least, when = floor_of(model)
    assert least == sliced_parameters(model, 8)
    assert when.startswith("8 of 48 dimensions are left")
    assert width_for(model, least) == 8


# The checkpoint


@pytest.mark.parametrize("layout", [*LAYOUTS, ("llama", "unequal")], ids=lambda layout: layout[1])
def test_a_stranger_reads_it_bit_for_bit(layout: tuple[str, str], tmp_path: Path) -> None:
    if layout[1] == "unequal":
        model, _ = pruned(("llama", "qwen2"))
        slice_to(model, WIDTH, [some_ids(1)], dtype="float32")
    else:
        model = sliced(layout, vocab_size=VOCAB)
    ids = torch.randint(3, VOCAB, (2, 24))
    torch.save(ids, tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, ids))
    assert found == {
        "ours": ["adapt_pruner"], "class": type(model).__name__, "base": True, "cached": True, "static": True, "learns": True, "again": True,
    }  # fmt: skip
    assert type(model).__name__.startswith("Sliced")
    config = read_json(tmp_path / "model" / "config.json")
    assert (config["hidden_size"], config["sliced_hidden_size"], config["tie_word_embeddings"]) == (48, WIDTH, False)
    assert config["head_dim"] == model.model.layers[0].self_attn.head_dim

    ours = load(str(tmp_path / "model")).model  # no trust_remote_code
    assert torch.equal(logits(ours, ids), logits(model, ids))
    assert count_parameters(load_shapes(str(tmp_path / "model"))) == count_parameters(model)
    assert all(layer.self_attn.config is ours.config for layer in ours.model.layers), "a choice of kernel reaches every layer"


def test_in_half_precision_norms_round_once() -> None:
    norm = sliced().bfloat16().model.layers[0].input_layernorm
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm(x), norm(x.double()).bfloat16())


def test_how_the_model_generates_stays() -> None:
    model = tiny_model()
    model.generation_config.top_k = 7
    slice_to(model, WIDTH, [some_ids(1)], dtype="float32")
    assert model.generation_config.top_k == 7


# In a run


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "slicegpt", "model": str(tiny_folder), "budget": "90%", "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "evaluation": {"source": str(text_file), "window": 64, "max_windows": 5},
    })  # fmt: skip


TRAINING = {"tokens": 4_000, "batch_tokens": 512, "length": 64, "lr": 3e-3}


def test_a_recipe_slices_to_its_budget(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    figures = prune(recipe, tmp_path / "out", listen=as_dicts(heard.append)).figures
    saved = load(str(tmp_path / "out"))
    dense = load(recipe.model).model
    width = saved.model.config.sliced_hidden_size
    assert figures["params_after"] == count_parameters(saved.model) == sliced_parameters(dense, width) <= figures["budget"]
    assert sliced_parameters(dense, width + 8) > figures["budget"]
    assert (figures["iterations"], figures["method"]) == (1, "slicegpt")
    assert [event["sizes"] for event in heard if event["event"] == "cut"] == [{"width": width}]
    assert [event["of"] for event in heard if event["event"] == "progress" and event["phase"] == "score" and event["of"]] == [
        6
    ] * 6
    assert saved.dense_params == count_parameters(dense)

    found = anatomy(saved.model, mask=saved.mask, dense_params=saved.dense_params)
    assert found["decoder_params"] == decoder_parameters(saved.model) == figures["decoder_params_after"]
    assert [(row["heads"], row["neurons"], row["share_of_dense"]) for row in found["layers"]] == [(6, 40, None)] * 3
    assert found["share_of_dense"] == figures["params_after"] / figures["params_before"]


def test_a_sliced_model_is_not_cut_further(recipe: Recipe, tmp_path: Path) -> None:
    prune(recipe, tmp_path / "sliced")
    for method in ("adapt-pruner", "slicegpt"):
        again = suited(
            recipe.model_dump()
            | {
                "model": str(tmp_path / "sliced"),
                "method": method,
                "reduce": "units",
                "budget": "90%",
                "distance": "blocks.cosine",
            }
        )
        with pytest.raises(UsageError, match="a sliced model cannot be cut further; prune the dense model it came from"):
            prune(again, tmp_path / "again")


def test_rotating_in_stages_or_with_a_repair_is_refused() -> None:
    with pytest.raises(UsageError, match=r"repair would be ignored, since reduce 'slice' does not read it; set repair=null"):
        read({"method": "slicegpt", "repair": next(iter(parts.names("repair")))})
    with pytest.raises(UsageError, match="reduce 'slice' can run only once, and stages is 3; set stages to 1"):
        read({"method": "slicegpt", "stages": 3})


def test_too_little_text_is_said(recipe: Recipe, tmp_path: Path, text_file: Path) -> None:
    heard: list[dict[str, Any]] = []
    little = read(recipe.model_dump() | {"calibration": {"source": str(text_file), "samples": 1, "length": 16}})
    prune(little, tmp_path / "out", listen=as_dicts(heard.append))
    assert any(re.search(r"16 tokens, fewer than the \d+ directions to keep; set", event.get("message", "")) for event in heard)


def test_it_is_planned_as_one_iteration(recipe: Recipe) -> None:
    planned = dry_run(recipe)
    assert [(stage["iterations"], stage["calibration_tokens"]) for stage in planned["stages"]] == [(1, 256)]
    with pytest.raises(UsageError, match="remain when 8 of 48 dimensions are left"):
        dry_run(read(recipe.model_dump() | {"budget": "1000"}))


def test_it_trains_afterwards_and_goes_on_after_an_interruption(
    recipe: Recipe, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = read(recipe.model_dump() | {"training": {"source": str(text_file), **TRAINING}})
    whole = run(training, tmp_path / "whole")
    assert whole is not None
    assert whole.figures["perplexities"][-1] < 0.7 * whole.figures["perplexities"][0]

    def cut_short(*_: Any, **__: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_training, "steps", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run(training, tmp_path / "halved")
    assert [path.name for path in (tmp_path / "halved" / "checkpoints").iterdir()] == ["stage-1-pruned"]
    monkeypatch.setattr(slicing, "slice_to", cut_short)  # it is sliced already
    assert run(training, tmp_path / "halved") is not None
    weights = [load(str(tmp_path / name / "model")).model.state_dict() for name in ("whole", "halved")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    more = training.model_dump() | {
        "model": str(tmp_path / "whole" / "model"),
        "method": "uniform",
        "chooser": "allocate.uniform",
        "reduce": "units",
        "budget": "100%",
    }
    assert run(read(more), tmp_path / "more") is not None, "a sliced model trains on as it is"


def test_the_log_of_a_sliced_run_is_strict_json(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["loss"] for event in log if event["event"] == "cut"] == [None]


def test_text_is_read_whatever_parts_the_recipe_names(recipe: Recipe) -> None:
    blind = read({"method": "magnitude-all", "reduce": "slice", "model": recipe.model, "budget": "90%"})
    assert blind.metric == "weights.magnitude"
    assert Work.of(tiny_model(), blind).reads_text


def test_liger_has_no_kernel_for_it(recipe: Recipe, text_file: Path, tmp_path: Path) -> None:
    training = recipe.model_dump() | {"training": {"source": str(text_file), **TRAINING, "liger": True}}
    with pytest.raises(UsageError, match="no kernel for the norms of a sliced model"):
        run(read(training), tmp_path / "run")


def test_liger_has_no_kernel_for_what_is_not_there(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = {
        "model": str(tiny_folder),
        "budget": "80%",
        "axes": ["mlps"],
        "chooser": "depth.drop_layers",
        "distance": "blocks.loss_drop",
    }
    training = {"training": {"source": str(text_file), **TRAINING, "liger": True}}
    with pytest.raises(UsageError, match="no kernel for a layer without its attention or MLP"):
        run(read(asked | training), tmp_path / "run")


def test_axes_of_a_sliced_model_say_what_it_is_made_of() -> None:
    sizes = [{axis.name: axis.size for axis in families.axes(model)} for model in (tiny_model(), sliced())]
    assert sizes[0].pop("residual") == 48
    whole = {name: size for name, size in sizes[0].items() if not name.endswith(("attentions", "mlps"))}
    assert whole == sizes[1], "but its stream is no axis, nor are its blocks, since it is in another basis at every block"
