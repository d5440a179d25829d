"""`reduce: sparse`: the walk over the layers against passes of whole models, runs that are broken off, and what is refused."""

import copy
import json
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapt_pruner.checkpoint.load import load
from adapt_pruner.cli import app
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.core.model.weight_mask import WeightMask, linear_layers, oriented, packed
from adapt_pruner.core.system import world
from adapt_pruner.core.system.filenames import WEIGHT_MASK
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import anatomy
from adapt_pruner.recipe import read
from adapt_pruner.reduce.zeros import layer_inputs
from adapt_pruner.reduce.zeros.layer_inputs import Walk, from_dense, onward
from adapt_pruner.reduce.zeros.solvers import Inputs, magnitude
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import forecast
from conftest import (
    VOCAB,
    as_dicts,
    assert_refused,
    assert_same_model,
    break_off,
    byte_tokenizer,
    in_two_processes,
    log_of,
    read_json,
    tiny_model,
)

HALF = Pattern.parse("50%")
ROWS = ("magnitude-sparse", "wanda", "sparsegpt", "fistapruner")


def recipe_of(folder: Path, text: Path, method: str = "wanda", **more: Any) -> Any:
    keys = {"model": str(folder), "method": method, "dtype": "float32", "sparsity": "2:4", **more}
    return read({"calibration": {"source": str(text), "samples": 8, "length": 32}, **keys}, shared=True).fitted(more)


def entering(model: Any, batches: Any, name: str) -> torch.Tensor:
    """What enters a linear layer, [inputs, tokens], in passes of the whole model."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(seen).t()


def walked(
    model: Any, batches: Any, told: dict[str, Inputs], *, done: int = 0, steps: Any = onward, layers: int | None = None
) -> None:
    """Walk over a model by magnitude, noting what the solver is told of each linear layer, for so many layers."""
    names = {oriented(module).data_ptr(): name for name, module in linear_layers(model).items()}

    def solve(weight: torch.Tensor, inputs: Inputs | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert inputs is not None
        told[names[weight.data_ptr()]] = inputs
        return magnitude(weight, HALF)

    walk = Walk(model, batches, solve, True, done, CAUSAL_LM, "float32")
    for number, _ in enumerate(steps(walk), start=1):
        if number == layers:
            break


@pytest.mark.parametrize("layout", [("llama", "llama"), ("phi3", "phi3"), ("gemma3", "gemma3")], ids=lambda layout: layout[1])
def test_layers_are_entered_by_what_the_sparse_ones_before_them_give(
    layout: tuple[str, str], batches: list[torch.Tensor]
) -> None:
    dense, model, told = tiny_model(layout), tiny_model(layout), dict[str, Inputs]()
    walked(model, batches, told)
    before = copy.deepcopy(dense)
    for index in range(len(model.get_decoder().layers)):
        for name in linear_layers(before, layer=index):
            values = entering(before, batches, name)
            assert told[name].gram is not None
            assert torch.allclose(told[name].gram, values @ values.t(), rtol=1e-3, atol=1e-3), name  # type: ignore[arg-type]
            assert torch.allclose(told[name].squares, values.double().square().sum(dim=1), rtol=1e-3)
            assert told[name].cross is None
        for name, module in linear_layers(before, layer=index).items():
            module.weight.data.copy_(model.get_submodule(name).weight)


def test_with_dense_inputs_layers_make_up_for_those_before_them_in_their_decoder_layer_alone(batches: list[torch.Tensor]) -> None:
    dense, model, told = tiny_model(), tiny_model(), dict[str, Inputs]()
    walked(model, batches, told, steps=lambda walk: from_dense(walk, correction=True))
    for index in range(3):
        partly = copy.deepcopy(dense)
        for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            its = [name for name in linear_layers(dense, layer=index) if name.endswith(group)]
            values, whole = entering(partly, batches, its[0]), entering(dense, batches, its[0])
            for name in its:
                assert torch.allclose(told[name].gram, values @ values.t(), rtol=1e-3, atol=1e-3), name  # type: ignore[arg-type]
                if group[0] == "q_proj":
                    assert told[name].cross is None
                else:
                    assert torch.allclose(told[name].cross, whole @ values.t(), rtol=1e-3, atol=1e-3), name  # type: ignore[arg-type]
                    assert torch.allclose(told[name].dense, whole @ whole.t(), rtol=1e-3, atol=1e-3), name  # type: ignore[arg-type]
                partly.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)

    again, uncorrected = tiny_model(), dict[str, Inputs]()
    walked(again, batches, uncorrected, steps=lambda walk: from_dense(walk, correction=False))
    values = entering(dense, batches, "model.layers.2.mlp.down_proj")
    assert torch.allclose(uncorrected["model.layers.2.mlp.down_proj"].gram, values @ values.t(), rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
    assert uncorrected["model.layers.2.mlp.down_proj"].cross is None


@pytest.mark.parametrize("steps", [onward, lambda walk: from_dense(walk, correction=True)], ids=["onward", "from_dense"])
def test_a_walk_that_was_left_is_gone_on_with_to_the_last_bit(steps: Any, batches: list[torch.Tensor]) -> None:
    whole, parts = tiny_model(num_hidden_layers=5), tiny_model(num_hidden_layers=5)
    at_once, in_two = dict[str, Inputs](), dict[str, Inputs]()
    walked(whole, batches, at_once, steps=steps)
    walked(parts, batches, in_two, steps=steps, layers=2)
    walked(parts, batches, in_two, steps=steps, done=2)
    assert at_once.keys() == in_two.keys()
    for name, inputs in at_once.items():
        assert torch.equal(inputs.gram, in_two[name].gram), name  # type: ignore[arg-type]
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_processes_share_the_text(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = dict[str, Inputs](), dict[str, Inputs]()
    walked(tiny_model(), batches, alone, layers=1)
    in_two_processes(monkeypatch, lambda: walked(tiny_model(), batches, together, layers=1))
    for name, inputs in alone.items():
        assert torch.allclose(inputs.gram, together[name].gram, rtol=1e-4), name  # type: ignore[arg-type]


def test_processes_solve_a_layer_each_where_layers_are_entered_by_the_dense_model(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, ranks = partial(from_dense, correction=True), iter((0, 1))
    alone, together = tiny_model(num_hidden_layers=5), [tiny_model(num_hidden_layers=5) for _ in range(2)]
    walked(alone, batches, {}, steps=steps)

    def work() -> None:
        rank = next(ranks)
        monkeypatch.setattr(world, "rank", lambda: rank)
        told = dict[str, Inputs]()
        walked(together[rank], batches, told, steps=steps)
        assert {int(name.split(".")[2]) for name in told} == ({4, 3, 1} if rank == 0 else {2, 0})  # 4 stands alone

    in_two_processes(monkeypatch, work)
    for (name, one), other in zip(alone.named_parameters(), together[1].parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("sparsity", ["2:4", "60%"])
@pytest.mark.parametrize("method", ROWS)
def test_every_row_makes_exactly_its_zeros_and_says_so(
    method: str, sparsity: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    prune(recipe_of(tiny_folder, text_file, method, sparsity=sparsity), tmp_path / "out")
    loaded = load(str(tmp_path / "out"))
    mask, dense = loaded.weight_mask, load(str(tiny_folder)).model
    assert mask is not None
    assert str(mask.pattern) == sparsity
    assert mask.broken(loaded.model) == []
    assert mask.unmasked(loaded.model) == []
    assert sorted(path.name for path in (tmp_path / "out").glob("*.py")) == []  # a plain folder
    for name, weight in dense.named_parameters():
        masked = name.removesuffix(".weight") in mask.kept
        assert torch.equal(weight, loaded.model.get_parameter(name)) is not masked, name
    if method in ("magnitude-sparse", "wanda"):
        for name, keep in mask.kept.items():
            assert torch.equal(loaded.model.get_submodule(name).weight, dense.get_submodule(name).weight * keep)


@pytest.mark.parametrize(
    ("method", "solver"), [("sparsegpt", None), ("fistapruner", None), ("fistapruner", "fista(reads=sparse)")]
)
def test_a_run_that_was_killed_between_layers_ends_the_same(
    method: str, solver: str | None, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_folder, text_file, method, checkpoint_minutes=0, **({"solver": solver} if solver else {}))
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="masked", nth=3)
    run(recipe, tmp_path / "broken")
    assert [line["done"] for line in log_of(tmp_path / "broken", "masked")] == [1, 2, 3]
    read = [log_of(tmp_path / name, "cut")[-1]["read"] for name in ("whole", "broken")]
    assert read == [8 * 32, 8 * 32]
    assert len(log_of(tmp_path / "broken", "resumed")) == 1
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    one, other = (load(str(tmp_path / name / "model")).weight_mask for name in ("whole", "broken"))
    assert one == other
    assert one is not None


def test_layers_are_not_solved_again_once_all_are_done(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Killed after the checkpoint that follows the last layer, before the run has noted that the reduction is over."""
    recipe = recipe_of(tiny_folder, text_file, "sparsegpt", checkpoint_minutes=0)
    break_off(recipe, tmp_path / "broken", kind="saved", nth=4)
    assert (tmp_path / "broken" / "checkpoints" / "stage-1-cut-1").is_dir()
    told: list[dict[str, Any]] = []
    run(recipe, tmp_path / "broken", listen=as_dicts(told.append))
    assert not [event for event in told if event["event"] in ("masked", "cut")]
    assert len(log_of(tmp_path / "broken", "cut")) == 1


def test_no_other_sparsity_once_all_layers_have_their_zeros(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, "sparsegpt", checkpoint_minutes=0)
    break_off(recipe, tmp_path / "broken", kind="saved", nth=4)
    with pytest.raises(UsageError, match="this run has its zeros already, of sparsity 2:4, and now the recipe says 50%"):
        run(recipe_of(tiny_folder, text_file, "sparsegpt", sparsity="50%"), tmp_path / "broken", force_recipe=True)


def test_no_other_pattern_once_some_layers_have_their_zeros(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, "sparsegpt", checkpoint_minutes=0)
    break_off(recipe, tmp_path / "broken", kind="masked", nth=3)
    with pytest.raises(UsageError, match="2 decoder layers of this run have their zeros already"):
        run(recipe_of(tiny_folder, text_file, "sparsegpt", sparsity="50%"), tmp_path / "broken", force_recipe=True)


def test_what_the_layers_read_is_the_solvers_choice(
    batches: list[torch.Tensor], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    last, told, weights = "model.layers.2.mlp.down_proj", dict[str, Inputs](), dict[str, torch.Tensor]()
    for reads in ("corrected", "dense", "sparse"):
        seen: dict[str, Inputs] = {}
        walked(tiny_model(), batches, seen, steps=partial(layer_inputs.walked, reads=reads))
        told[reads] = seen[last]
        prune(recipe_of(tiny_folder, text_file, "fistapruner", solver=f"fista(reads={reads})"), tmp_path / reads)
        weights[reads] = load(str(tmp_path / reads)).model.get_submodule(last).weight
    by_itself: dict[str, Inputs] = {}
    walked(tiny_model(), batches, by_itself, steps=onward)
    assert torch.equal(told["sparse"].squares, by_itself[last].squares)
    assert not torch.equal(told["sparse"].squares, told["dense"].squares)
    assert [told[reads].cross is None for reads in ("corrected", "dense", "sparse")] == [False, True, True]
    assert not torch.equal(weights["corrected"], weights["dense"])
    assert not torch.equal(weights["dense"], weights["sparse"])


def test_recovery_keeps_the_zeros_and_a_killed_one_ends_the_same(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    training = {"source": str(text_file), "tokens": 1024, "batch_tokens": 128, "length": 32, "lr": 1e-3}
    recipe = recipe_of(tiny_folder, text_file, training=training, checkpoint_minutes=0)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=4)
    run(recipe, tmp_path / "broken")
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    trained = load(str(tmp_path / "whole" / "model"))
    prune(recipe_of(tiny_folder, text_file), tmp_path / "untrained")
    before = load(str(tmp_path / "untrained"))
    assert trained.weight_mask == before.weight_mask
    assert trained.weight_mask is not None
    assert trained.weight_mask.unmasked(trained.model) == []
    assert not torch.equal(trained.model.model.layers[0].mlp.up_proj.weight, before.model.model.layers[0].mlp.up_proj.weight)


def test_a_sparse_model_recovers_in_a_run_of_its_own(
    sparse_folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32, "lr": 1e-3, "objective": "distil"}
    asked = {"method": "best", "budget": "100%", "sparsity": "", "training": training | {"teacher": str(tiny_folder)}}
    run(recipe_of(sparse_folder, text_file, **asked), tmp_path / "run")  # type: ignore[arg-type]
    before, after = load(str(sparse_folder)), load(str(tmp_path / "run" / "model"))
    assert after.weight_mask == before.weight_mask
    assert after.weight_mask is not None
    assert after.weight_mask.broken(after.model) == []
    assert not torch.equal(after.model.model.layers[0].mlp.up_proj.weight, before.model.model.layers[0].mlp.up_proj.weight)
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "# tiny-llama with 2:4 zeros" in card
    assert "Training with other tools fills the zeros" in card
    assert "adaptive-ls-v1 kept the zeros of the model, with training on" in (tmp_path / "run" / "report.html").read_text(
        encoding="utf-8"
    )


def test_units_go_from_a_sparse_model_and_zeros_come_to_a_pruned_one(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    prune(recipe_of(tiny_folder, text_file, "magnitude-sparse"), tmp_path / "sparse")
    heard: list[dict[str, Any]] = []
    smaller = {
        "budget": "80%", "method": "uniform", "sparsity": "", "axes": ["neurons"], "distance": None, "head_metric": None, "repair": None,
    }  # fmt: skip
    prune(recipe_of(tmp_path / "sparse", text_file, **smaller), tmp_path / "both", listen=as_dicts(heard.append))  # type: ignore[arg-type]
    both = load(str(tmp_path / "both"))
    assert both.weight_mask is not None
    assert both.weight_mask.unmasked(both.model) == []
    assert both.weight_mask.pattern is None
    assert sum("no longer follow 2:4" in event.get("message", "") for event in heard) == 1

    prune(recipe_of(tiny_folder, text_file, **smaller | {"multiple_of": 4}), tmp_path / "small")  # type: ignore[arg-type]
    prune(recipe_of(tmp_path / "small", text_file, "sparsegpt"), tmp_path / "other")
    other = load(str(tmp_path / "other"))
    assert other.mask is not None
    assert other.weight_mask is not None
    assert other.weight_mask.broken(other.model) == []


def test_a_mask_is_found_by_the_name_of_a_model_on_the_hub(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(recipe_of(tiny_folder, text_file, "magnitude-sparse"), tmp_path / "sparse")
    place = tmp_path / "cache" / "models--me--sparse"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "sparse", place / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here, there = load(str(tmp_path / "sparse")), load("me/sparse")
    assert there.weight_mask is not None
    assert there.weight_mask.broken(there.model) == []
    assert there.dense_params == here.dense_params is not None
    assert there.mask == here.mask is not None


def test_a_damaged_or_foreign_mask_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    prune(recipe_of(tiny_folder, text_file, "magnitude-sparse"), tmp_path / "sparse")
    file = tmp_path / "sparse" / WEIGHT_MASK
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(RunError, match=r"sparsity/weight_mask.safetensors of .* is damaged"):
        load(str(tmp_path / "sparse"))
    file.write_bytes(whole)
    (tmp_path / "sparse" / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    smaller = {"budget": "80%", "method": "uniform", "sparsity": "", "repair": None}
    assert_refused_run(lambda: recipe_of(tmp_path / "sparse", text_file, **smaller), tmp_path, "does not fit these weights")  # type: ignore[arg-type]
    wider = tmp_path / "wider"
    tiny_model(vocab_size=VOCAB, intermediate_size=48).save_pretrained(wider)
    byte_tokenizer().save_pretrained(wider)
    (wider / "sparsity").mkdir()
    (wider / WEIGHT_MASK).write_bytes(whole)
    with pytest.raises(
        RunError, match=r"sparsity/ of .* belongs to another model: the mask over .* is \(40, 48\), the weight is \(48, 48\)"
    ):
        load(str(wider))


def assert_refused_run(made: Any, tmp_path: Path, said: str) -> None:
    with pytest.raises((UsageError, RunError)) as refused:
        run(made(), tmp_path / "refused")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": "5:4"}, "keeps 5 of every 4"),
        ({"sparsity": "100%"}, "makes all weights zero"),
        ({"sparsity": ""}, "does not say how many; add --set sparsity=50%"),
        ({"sparsity": "16:32"}, "has 48 inputs, which is not a multiple of 32, so sparsity 16:32 does not fit it"),
        ({"budget": "80%"}, "cannot reach '80%'; give --sparsity 50% or --sparsity 2:4; for both, prune first"),
        ({"method": "uniform", "budget": "80%"}, "removes units and makes no zeros"),
        (
            {"method": "uniform", "sparsity": "", "budget": "80%", "solver": "wanda"},
            "solver would be ignored, since reduce 'units' does not read it; leave it out",
        ),
        ({"solver": None}, "the recipe names none; set solver to one of fista.fista, "),
        ({"solver": "fista(warm_start=fista)"}, "cannot start from fista"),
        ({"solver": "fista(warm_start=nothing)"}, "solver 'nothing' is not known"),
        ({"solver": "sparsegpt(blocks=3)"}, "has no option 'blocks'"),
        ({"stages": 2}, "can run only once"),
        ({"repair": "least_squares"}, "repair would be ignored"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **{"method": "wanda"} | changes), tmp_path / "run", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "wanda"}, "has zeros already (2:4), and wanda needs dense weights; name the model it was made from"),
        ({"method": "slicegpt", "budget": "80%", "sparsity": ""}, "reduce=slice would not keep the zeros"),
        ({"method": "best", "budget": "80%", "sparsity": ""}, "repair would not keep the zeros of a sparse model; set repair=null"),
        (
            {"method": "uniform", "budget": "80%", "sparsity": "", "repair": None,
             "training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32, "lora": {"rank": 4}}},
            "training.lora would not keep the zeros",
        ),
        (
            {"method": "uniform", "budget": "100%", "sparsity": "", "parallel": "fsdp",
             "training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32}},
            "parallel=fsdp would not keep the zeros",
        ),
        (
            {"method": "uniform", "budget": "100%", "sparsity": "",
             "training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32, "objective": "distil"}},
            "would use it as teacher; name the dense model as training.teacher",
        ),
    ],
)  # fmt: skip
def test_what_would_fill_zeros_is_refused(
    changes: dict[str, Any], said: str, sparse_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    if "training" in changes:
        changes = changes | {"training": changes["training"] | {"source": str(text_file)}}
    assert_refused(lambda: recipe_of(sparse_folder, text_file, **changes), tmp_path / "run", said)


@pytest.fixture(scope="module")
def sparse_folder(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sparse-llama"
    prune(recipe_of(tiny_folder, text_file, "magnitude-sparse"), folder)
    return folder


def test_a_mask_that_is_kept_is_read_back(sparse_folder: Path) -> None:
    mask = load(str(sparse_folder)).weight_mask
    assert isinstance(mask, WeightMask)
    assert mask.num_zeros == sum(keep.numel() for keep in mask.kept.values()) // 2
    assert load(str(sparse_folder), fresh=1).weight_mask is None


def test_what_is_not_zero_is_counted_beside_what_is_stored(
    sparse_folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    mask = load(str(sparse_folder)).weight_mask
    assert mask is not None
    whole = anatomy(load(str(tiny_folder)).model)
    made = read_json(sparse_folder / "pruning.json")["figures"]
    assert made["params_after"] == made["params_before"] == whole["params"]
    assert made["nonzero_before"] == whole["nonzero"]
    assert made["nonzero_after"] == whole["nonzero"] - mask.num_zeros
    listed = invoke("inspect", sparse_folder, "--json")
    assert json.loads(listed)["nonzero"] == made["nonzero_after"]
    assert json.loads(listed)["layers"][0]["nonzero"] == whole["layers"][0]["nonzero"] - mask.num_zeros // 3
    said = invoke("inspect", sparse_folder)
    assert "not zero" in said
    assert f"{made['nonzero_after']:,} parameters are not zero" in said
    assert "not zero" not in invoke("inspect", tiny_folder)
    measured = invoke("eval", tiny_folder, sparse_folder, "--text", text_file, "--window", "32", "--max-windows", "2")
    assert f"{made['nonzero_after']:,}" in measured

    written = (sparse_folder / "README.md").read_text(encoding="utf-8")
    assert f"| not zero | {made['nonzero_after']:,} parameters" in written
    assert "# tiny-llama with 2:4 zeros" in written
    assert "at most 2 of every 4 weights of the linear layers" in written
    assert "--sparsity 2:4 --method magnitude-sparse" in written


def test_verify_proves_the_zeros_of_a_folder(sparse_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said = " ".join(invoke("verify", sparse_folder).split())
    assert (
        "in 21 linear layers are zero (50.00%); in each, every group of 4 inputs has at most 2 weights that are not zero" in said
    )
    assert "nothing to verify without an artefact" in invoke("verify", tiny_folder, status=2)
    broken = tmp_path / "broken"
    shutil.copytree(sparse_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, :4] = 1.0
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj" in invoke("verify", broken, status=1)


def with_mask(folder: Path, path: Path, shapes: dict[str, Any], bits: dict[str, torch.Tensor]) -> Path:
    """A copy of a sparse model with another mask over weights, which has no pattern."""
    shutil.copytree(folder, path)
    about = {"format": "1", "pattern": "", "shapes": json.dumps(shapes)}
    save_file(bits, path / "sparsity" / "weight_mask.safetensors", metadata=about)
    return path


def test_a_mask_that_promises_nothing_proves_nothing(sparse_folder: Path, tmp_path: Path) -> None:
    name, keep = "model.layers.0.mlp.up_proj", torch.ones(40, 48, dtype=torch.bool)
    empty = with_mask(sparse_folder, tmp_path / "empty", {}, {})
    whole = with_mask(sparse_folder, tmp_path / "whole", {name: [40, 48]}, {name: packed(keep)})
    for folder in (empty, whole):
        said = " ".join(invoke("verify", folder, status=2).split())
        assert "has a mask over weights that makes none of them zero, so there is nothing to verify" in said
    keep[0] = load(str(sparse_folder)).weight_mask.kept[name][0]
    few = with_mask(sparse_folder, tmp_path / "few", {name: [40, 48]}, {name: packed(keep)})
    said = " ".join(invoke("verify", few).split())
    assert "these hold the 24 that the mask names; it has no pattern, so it promises no others" in said


@pytest.mark.parametrize("shape", [[-40, -48], [0, 48], [1920], [40.0, 48], [True, 1920], "40", None])
def test_a_mask_of_shapes_that_are_none_is_damaged(shape: Any, sparse_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    bits = torch.full((240,), 255, dtype=torch.uint8)[: 0 if shape == [0, 48] else None]
    folder = with_mask(sparse_folder, tmp_path / "folder", {name: shape}, {name: bits})
    said = " ".join(invoke("verify", folder, status=1).split())
    assert f"is damaged ({name} has the shape {shape}; a shape is [outputs, inputs], each 1 or more)" in said


def test_prune_says_what_to_type(tiny_folder: Path, tmp_path: Path) -> None:
    said = invoke("prune", tiny_folder, "-o", tmp_path / "out", "--method", "wanda", "--params", "80%", status=2)
    assert "--sparsity 50% or --sparsity 2:4" in " ".join(said.split())
    said = invoke("prune", tiny_folder, "-o", tmp_path / "out", "--method", "wanda", status=2)
    assert "add --sparsity 50% or --sparsity 2:4" in " ".join(said.split())
    done = invoke("prune", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude-sparse", "--sparsity", "50%")
    assert "not zero" in done
    assert not (tmp_path / "out" / "modeling_pruned.py").exists()


def invoke(*words: Any, status: int = 0) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, list(map(str, words)))
    said = (
        (done.stdout if "--json" in words else done.output)
        if done.exception is None or isinstance(done.exception, SystemExit)
        else str(done.exception)
    )
    assert done.exit_code == status or status, said
    assert bool(done.exit_code) is bool(status), said
    return said


def test_exports_say_that_their_engines_skip_no_zeros(
    sparse_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.loads(invoke("export", sparse_folder, "--to", "uniform", "-o", tmp_path / "plain", "--json"))
    assert len(said["notes"]) == 1
    assert "the 2:4 zeros of" in said["notes"][0]
    assert "multiplies by them" in said["notes"][0]
    assert load(str(tmp_path / "plain")).weight_mask == load(str(sparse_folder)).weight_mask
    loaded = load(str(sparse_folder))
    exporting = import_module("adapt_pruner.export")
    monkeypatch.setattr(exporting, "form_of", lambda name: SimpleNamespace(write=lambda *_, **__: []))
    notes = [note for quant in ("q4_k_m", "q8_0") for note in exporting.export(loaded, tmp_path / "m", to="gguf", quant=quant)]
    assert ["no longer zero" in note for note in notes] == [True, False]


@pytest.mark.parametrize(("form", "fits"), [("padded", True), ("padded", False), ("decilm", False)])
def test_a_padded_form_has_the_mask_where_no_shape_changes(
    form: str, fits: bool, sparse_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = sparse_folder
    if not fits:
        smaller = {
            "method": "magnitude-all",
            "chooser": "rank.per_parameter",
            "budget": "80%",
            "sparsity": "",
            "axes": ["neurons"],
            "multiple_of": 4,
        }
        prune(recipe_of(sparse_folder, text_file, **smaller), tmp_path / "smaller")  # type: ignore[arg-type]
        folder = tmp_path / "smaller"
    said = json.loads(invoke("export", folder, "--to", form, "-o", tmp_path / "out", "--json"))
    mask = load(str(folder)).weight_mask
    assert mask is not None
    assert load(str(tmp_path / "out"), trust_remote_code=True).weight_mask == (mask if fits else None)
    assert any("this folder has no mask over weights" in note for note in said["notes"]) == (not fits)


@pytest.mark.parametrize(("method", "words"), [("magnitude-sparse", []), ("wanda", []), ("sparsegpt", ["making zeros"])])
def test_a_dry_run_foretells_it(method: str, words: list[str], tiny_folder: Path, text_file: Path) -> None:
    planned = forecast.dry_run(recipe_of(tiny_folder, text_file, method))
    assert planned["params_before"] == planned["params_after"]
    assert [stage["iterations"] for stage in planned["stages"]] == [1]
    assert planned["time_without"] == words
    with pytest.raises(UsageError, match="not a multiple of 32"):
        forecast.dry_run(recipe_of(tiny_folder, text_file, method, sparsity="8:32"))
