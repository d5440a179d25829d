"""Memory and time by formula: held against the tensors of real training and scoring, and against counts by hand."""

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import families
from adapt_pruner.core.model import layers as layerwise
from adapt_pruner.core.model import loss
from adapt_pruner.core.system import memory
from adapt_pruner.data import windows
from adapt_pruner.recipe import read
from adapt_pruner.run import estimate, forecast, shrink, start
from adapt_pruner.run.estimate import PAPER, Setup, operations, process_bytes, pruning_memory, seconds, shapes, training_memory
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.score.calibrate import Evidence, score
from adapt_pruner.score.weights import taylor
from adapt_pruner.train import loop
from adapt_pruner.train.objectives import lm
from conftest import LAYOUTS, suited, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scaling_table
from memory_foreseen import EVIDENCE, WIDE, Case, Tensors, apart, foreseen, most_bytes

CONFIGS = Path(__file__).parent / "configs"

SMALL = WIDE | {
    "vocab_size": 4096,
    "hidden_size": 160,
    "intermediate_size": 512,
}  # a quarter of the tokens with it: the same shares
UNTIED = SMALL | {"vocab_size": 512, "tie_word_embeddings": False}
LONG = SMALL | {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
BROAD = UNTIED | {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 4}
ONE_LAYER = UNTIED | {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 16}  # fmt: skip
MANY_TOKENS = SMALL | {"vocab_size": 16_384, "hidden_size": 80, "intermediate_size": 256, "num_hidden_layers": 4}
CASES = {
    "states": Case("training", SMALL, Setup("cpu", False, 64, 128, 256)),
    "copies": Case("training", UNTIED, Setup("cpu", True, 8, 8, 16)),
    "checkpointing": Case("training", LONG, Setup("cpu", False, 64, 512, 1024, checkpointing=True)),
    "checkpointing-bfloat16": Case("training", SMALL, Setup("cpu", True, 8, 8, 16, checkpointing=True)),
    "fsdp": Case("training", SMALL, Setup("cpu", True, 32, 32, 128, processes=2, parallel="fsdp")),
    "activations": Case("training", LONG, Setup("cpu", False, 64, 512, 1024)),
    "activations-bfloat16": Case("training", LONG, Setup("cpu", True, 64, 512, 1024)),
    "pruning": Case("pruning", UNTIED, Setup("cpu", True, 64, 64, 128)),
    "pruning-float32": Case("pruning", UNTIED, Setup("cpu", False, 64, 64, 128)),
    "pruning-wide-layers": Case("pruning", BROAD, Setup("cpu", True, 64, 64, 128)),
    "pruning-many-tokens": Case("pruning", MANY_TOKENS, Setup("cpu", True, 64, 64, 128)),
    "samples": Case("samples", SMALL, Setup("cpu", False, 64, 64, 128)),
    "reading": Case("reading", SMALL, Setup("cpu", True, 64, 64, 128)),
    "repair": Case("repair", ONE_LAYER, Setup("cpu", False, 32, 32, 64), samples=32),
    "repair-twice": Case("repair-twice", ONE_LAYER, Setup("cpu", False, 64, 64, 128), samples=32),
}
TORCHAO = importlib.util.find_spec("torchao") is not None
if TORCHAO:
    CASES["8-bit"] = Case("training", SMALL, Setup("cpu", True, 8, 8, 16, stored=2, bits=8))
    CASES["4-bit-in-backward"] = Case("training", UNTIED, Setup("cpu", True, 8, 16, 16, stored=2, bits=4, in_backward=True))
CLOSE = 0.05
"""What the formulas leave out: norms, sums on their way, a layer's values at the moment of its peak."""


def of_config(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return shapes(LlamaForCausalLM(LlamaConfig(**config)))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration text is read 64 tokens at a time, as many as the models are small."""
    monkeypatch.setattr(windows, "MICRO_TOKENS", 64)
    if TORCHAO:
        monkeypatch.setattr(
            importlib.import_module("adapt_pruner.train.lowbit"), "PIECE", 2**13
        )  # numbers that are updated at a time


@cache
def counted(name: str) -> int:
    """Bytes of the tensors of a case that live at one time, at the most; processes are asked for the first one's."""
    if CASES[name].how.processes > 1:
        return apart(CASES[name], tensors=True)
    with Tensors() as tensors:
        return most_bytes(CASES[name], tensors)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", CASES)
def test_tensors_take_what_the_formulas_say(name: str) -> None:
    """The code decides it, whatever the processor packs and the allocator keeps; benchmarks/memory_foreseen.py measures those."""
    parts = foreseen(CASES[name])
    assert sum(parts.values()) == pytest.approx(counted(name), rel=CLOSE), parts


@pytest.mark.usefixtures("short")
def test_a_term_that_a_formula_forgot_would_show() -> None:
    """Each is large enough in one of the cases."""
    terms, shown = set(), set()
    for name, case in CASES.items():
        parts = foreseen(case)
        formula = "pruning" if case.phase in EVIDENCE else case.phase.partition("-")[0]
        for term, size in parts.items():
            terms |= {(formula, term)} if size else set()
            if sum(parts.values()) - size != pytest.approx(counted(name), rel=CLOSE):
                shown.add((formula, term))
    assert terms == shown
    assert len(terms) >= 8 + 7 + 5, "none is zero in all cases but the moments of a pruning"


def test_8b_with_lora_on_a_stored_base_trains_on_a_card_of_24_gb() -> None:
    of = of_config(json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text()))
    how = Setup("cuda", True, 2048, 2048, 16_384, checkpointing=True, lora=64, stored=2)
    parts = training_memory(of, how)
    assert parts["weights"] == 2 * of.params + 4 * how.trained(of)
    assert 17 <= process_bytes(parts, "cuda") / 2**30 <= 22
    assert process_bytes(training_memory(of, replace(how, stored=4)), "cuda") > 32e9, "a base in float32 does not"


def test_a_process_holds_more_than_its_tensors() -> None:
    """How much more was measured; on a CPU there is Python, and what glibc keeps where activations lay."""
    weights, activations = {"weights": 10**9}, {"activations": 10**9}
    assert process_bytes({}, "cuda") == 0 < 10**8 < process_bytes({}, "cpu")
    for device in ("cpu", "cuda"):
        assert (
            process_bytes(weights | activations, device)
            >= process_bytes(weights, device) + 10**9
            > process_bytes({}, device) + 2 * 10**9
        )
    assert process_bytes(activations, "cpu") > process_bytes(weights, "cpu")


def test_an_iteration_of_best_takes_what_is_foreseen() -> None:
    """Measured with the command in README on a Xeon with AMX: the peak is in the factors, whose passes read half of a batch."""
    sizes = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    }
    of, how = of_config(sizes | {"num_key_value_heads": 3, "tie_word_embeddings": True}), Setup("cpu", True, 128)
    asked: dict[str, Any] = {"samples": 64, "length": 128, "moments": False}
    scoring = pruning_memory(of, how, **asked, reads=True)
    factors = pruning_memory(of, how, **asked, evidence=Evidence.STREAM_GRADIENTS, halved=True)
    assert process_bytes(factors, "cpu") == pytest.approx(1_503_965_184, rel=0.02)
    assert process_bytes(scoring, "cpu") < process_bytes(factors, "cpu")


def test_the_sizes_that_other_files_set_are_the_same_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas read them where the work is done: what changes there changes here."""
    of, how = shapes(tiny_model()), Setup("cpu", True, 64, None, 2**20)

    def told() -> dict[str, int]:
        whole = Evidence.SAMPLE_GRADIENTS  # how many layers make a group depends on the tokens, too
        training = training_memory(of, how)
        pruning = pruning_memory(of, how, samples=64, length=64, moments=False, evidence=whole)
        return {"tokens": how.tokens, "loss": training["loss"], "scored": pruning["activations"]}

    before = told()
    monkeypatch.setattr(loop, "MICRO_TOKENS", {"cpu": 1024, "cuda": 1024})
    assert told()["tokens"] == before["tokens"] // 2 == 1024
    monkeypatch.setattr(windows, "MICRO_TOKENS", 2 * windows.MICRO_TOKENS)
    assert told()["scored"] == 2 * before["scored"]
    fewer = told()["loss"]
    monkeypatch.setattr(loss, "MAX_LOGITS", of.vocabulary)
    rows = told()["loss"]
    assert fewer - rows == 2 * of.vocabulary * (1024 - loss.CACHED_ROWS)
    monkeypatch.setattr(loss, "CACHED_ROWS", 1)
    assert rows - told()["loss"] == (2 + 4) * of.vocabulary * 63


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_shapes_are_read_from_any_model(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    config, of = model.config, shapes(model)
    layers, head_dim = config.num_hidden_layers, model.model.layers[0].self_attn.head_dim
    assert (of.layers, of.vocabulary, of.width) == (layers, 97, config.hidden_size)
    assert of.queries == layers * config.num_attention_heads * head_dim
    assert of.keys == layers * config.num_key_value_heads * head_dim
    assert of.neurons == layers * config.intermediate_size
    assert of.params - of.decoder == of.width * (97 if config.tie_word_embeddings else 194) + of.width  # and the last norm
    half = of.cut_to(of.params - of.decoder // 2)
    assert half.params - half.decoder == pytest.approx(of.params - of.decoder, abs=1)
    assert half.neurons == pytest.approx(of.neurons / 2, rel=0.01)


@pytest.mark.parametrize("kind", ["train", "read", "score"])
def test_operations_are_those_that_torch_counts(kind: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = tiny_model(("llama", "llama-mha-biased"), hidden_size=96, intermediate_size=256)
    model.set_attn_implementation("eager")  # whose products are counted, but over future tokens too
    of, ids = shapes(model), torch.randint(3, 97, (2, 96))
    with FlopCounterMode(display=False) as counted:
        if kind == "read":
            with torch.no_grad():
                lm(model, ids)
        elif kind == "score":
            score(
                model, [axis for axis in families.axes(model) if axis.layer is not None], [ids], metrics=[taylor], dtype="float32"
            )
        else:
            lm(model, ids).backward()
    # not in it: future tokens; the other way round, vectors are not multiplied, the last token predicts nothing, and scoring
    # needs no gradient of what enters the first layer
    how, passes = Setup("cpu", False, 96), {"read": 1, "train": 3, "score": 4}[kind]
    vectors = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 1)
    entering = 2 * of.width * (of.queries + 2 * of.keys) // of.layers if kind == "score" else 0
    last = 2 * of.head * {"read": 1, "score": 2, "train": 3}[kind]
    a_token = operations(of, how, kind=kind) + passes * (2 * of.queries * 96 - 2 * vectors) - entering
    assert counted.get_total_flops() == pytest.approx(a_token * ids.numel() - last * len(ids), rel=1e-6)


def test_what_changes_with_the_setup() -> None:
    of = of_config(WIDE)
    alone = Setup("cuda", True, 1024, 4096, 65_536)
    one = training_memory(of, alone)
    assert training_memory(of, replace(alone, processes=8)) == one, "ddp keeps everything on each process"
    shared = training_memory(of, replace(alone, processes=8, parallel="fsdp"))
    assert all(shared[key] == one[key] // 8 for key in ("weights", "gradients", "moments"))
    assert sum(shared.values()) < sum(one.values())
    assert training_memory(of, replace(alone, parallel="fsdp")) == one, "alone there is nobody to share with"
    assert training_memory(of, replace(alone, processes=64))["activations"] == one["activations"] // 4, "a smaller part of a step"

    low_rank = training_memory(of, replace(alone, lora=8))
    assert low_rank["moments"] < one["moments"] / 10
    taught = training_memory(of, replace(alone, teacher=of))
    assert taught["teacher"] == 2 * of.params + 2 * 4096 * of.width
    assert training_memory(of, replace(alone, checkpointing=True))["activations"] < one["activations"] / 3
    carried = pruning_memory(of, replace(alone, processes=8, parallel="fsdp"), samples=64, length=64, moments=True)
    assert (carried["weights"], carried["moments"]) == (4 * of.params, 8 * of.params), "whole on each process"
    on_disk = replace(alone, processes=8, parallel="fsdp", offload="disk")
    carried = pruning_memory(of, on_disk, samples=64, length=64, moments=True)
    assert (carried["weights"], carried["moments"]) == (0, 0), "on disk, once for a machine"


def test_70b_trains_on_eight_cards_of_80_gb() -> None:
    """Weights and gradients in bfloat16 and moments of 8 bits are 50 GiB on each of eight, of the model as it is."""
    training = {
        "source": "text.jsonl.gz", "tokens": "1B", "batch_tokens": 2**19, "length": 2048, "micro_batch_tokens": 2048, "gradient_checkpointing": True,
        "weights": "bfloat16", "optimizer": "adamw8bit",
    }  # fmt: skip
    keys = {
        "model": str(CONFIGS / "llama-3.1-70b"),
        "method": "llm-pruner",
        "training": training,
        "calibration": {"source": "text.jsonl.gz"},
    }
    planned = dry_run(read(keys | {"budget": "95%", "parallel": "fsdp"}), processes=8)
    assert (planned["offload"], planned["too_large"]) == ("disk", None)
    of = planned["memory"]["training"]["of"]
    assert sum(of[key] for key in ("weights", "gradients", "moments")) / 0.95 / 2**30 == pytest.approx(50, abs=1)
    assert planned["memory"]["pruning"]["bytes"] < 20 * 2**30
    assert dry_run(read(keys | {"budget": "95%"}), processes=8)["too_large"] is not None, "each whole"


def test_groups_are_planned_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sizes decide how many layers have gradients at one time, in the formula and in the work."""
    model = tiny_model()
    batches, told = list(torch.ones(6, 64, dtype=torch.long).split(4)), []

    def noted(depth: int, **sizes: float) -> int:
        told.append({"depth": depth, **sizes})
        return 1

    monkeypatch.setattr(layerwise, "layers_at_once", noted)
    monkeypatch.setattr(estimate, "layers_at_once", noted)
    layerwise.Sweep(model, batches, dtype="float32")
    pruning_memory(shapes(model), Setup("cpu", False, 64, None, 2**20), samples=6, length=64, moments=False)
    made, planned = told
    assert planned == pytest.approx(made)


def test_passes_without_gradients_may_hold_the_most() -> None:
    of, how = of_config(WIDE), Setup("cuda", True, 1024, 4096, 65_536)
    asked = {"samples": 64, "length": 128, "moments": False}
    scoring, both = pruning_memory(of, how, **asked), pruning_memory(of, how, **asked, reads=True)
    alone = pruning_memory(of, how, **asked, evidence=Evidence.FORWARD)
    assert both == (alone if sum(alone.values()) > sum(scoring.values()) else scoring)
    assert alone["bfloat16 copies"] == 2 * (of.decoder + of.head)
    streams = pruning_memory(of, how, **asked, evidence=Evidence.STREAM_GRADIENTS)
    samples = pruning_memory(of, how, **asked, evidence=Evidence.SAMPLE_GRADIENTS)
    assert streams["gradients"] == 0
    assert samples["gradients"] == samples["squared gradients"] == 4 * of.decoder
    assert sum(samples.values()) - sum(streams.values()) == 8 * of.decoder


def test_time_is_operations_and_what_is_sent() -> None:
    of, speed = of_config(WIDE), PAPER["cuda"]
    alone = Setup("cuda", True, 1024, 4096, 65_536)
    flops = 655_360 * operations(of, alone, kind="train")
    tokens = {"flops": flops, "trained": 655_360}
    one = seconds(of, alone, speed, **tokens)
    assert one == seconds(of, alone, speed, flops=flops) == pytest.approx(flops / speed.flops)
    eight = replace(alone, processes=8)
    assert seconds(of, eight, speed, **tokens) == pytest.approx(one / 8 + 10 * 8 * of.params * 7 / 8 / speed.near)
    sharded = replace(eight, parallel="fsdp")  # 10 steps of 2 passes
    assert seconds(of, sharded, speed, **tokens) == pytest.approx(one / 8 + 20 * 8 * of.params * 7 / 8 / speed.near)
    far = replace(alone, processes=16)
    assert seconds(of, far, speed, **tokens) == pytest.approx(one / 16 + 10 * 8 * of.params * 15 / 16 / speed.far)
    taught, frozen = (replace(alone, **change) for change in ({"teacher": of}, {"lora": 8}))
    assert 655_360 * operations(of, taught, kind="train") == pytest.approx(flops * 4 / 3)
    assert 655_360 * operations(of, frozen, kind="train") == pytest.approx(flops * 2 / 3)


def test_a_teacher_is_planned_from_its_config_too() -> None:
    student = {"model": str(CONFIGS / "mobilellm-350m"), "budget": "80%", "training": {"source": "x", "tokens": "1M"}}
    plain = dry_run(read(student))
    named = student["training"] | {"objective": "objectives.distil", "teacher": str(CONFIGS / "mobilellm-1b")}
    taught = dry_run(read(student | {"training": named}))
    assert taught["memory"]["training"]["of"]["teacher"] >= 2 * 1_005_461_760
    assert taught["seconds"] > 1.5 * plain["seconds"]
    itself = dry_run(read(student | {"training": student["training"] | {"objective": "objectives.distil"}}))
    assert 2 * 345_355_200 <= itself["memory"]["training"]["of"]["teacher"] < 2 * 10**9


def test_a_cpu_is_planned_for_where_the_recipe_says_so() -> None:
    asked = {"model": str(CONFIGS / "mobilellm-350m"), "budget": "80%", "device": "cpu"}
    planned = dry_run(read(asked))
    assert planned["device"] == "cpu"
    assert "0.1 TFLOP/s" in planned["speed"]
    assert "training" not in planned["memory"]


@pytest.mark.parametrize(
    ("asked", "left_out"),
    [
        ({"head_metric": None}, []),
        ({}, []),
        ({"method": "adaptive-ls-v1"}, []),
        ({"method": "adaptive-ls-v1", "device": "cuda"}, ["writing text"]),
        ({"method": "wanda-sp"}, []),
        ({"method": "evopress"}, ["searching"]),
        ({"axes": ["layers"], "chooser": "depth.drop_layers", "distance": "blocks.loss_drop"}, []),
        ({"head_metric": None, "evaluation": {"tasks": "piqa"}}, ["scoring tasks"]),
        ({"head_metric": None, "evaluation": {"source": "x", "max_windows": 8}}, []),
        ({"head_metric": None, "evaluation": {"source": "x", "max_windows": None}}, ["reading the whole held-out text"]),
        ({"head_metric": None, "calibration": {"source": "self"}, "device": "cuda"}, ["writing text"]),
        ({"head_metric": None, "calibration": {"self_generated": 4}, "device": "cuda"}, []),
        ({"method": "magnitude", "calibration": {"source": "self"}, "device": "cuda"}, []),
        ({"method": "slicegpt"}, []),
    ],
)
def test_a_plan_names_what_its_time_leaves_out(asked: dict[str, Any], left_out: list[str]) -> None:
    common = {"method": "adapt-pruner", "model": str(CONFIGS / "mobilellm-350m"), "budget": "80%", "device": "cpu"}
    asked = asked | {"calibration": {"source": "python-docs:train"} | asked.get("calibration", {})}
    planned = dry_run(suited(common | asked))
    assert planned["time_without"] == left_out


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({}, {"repair": None}),
        ({"method": "adapt-pruner"}, {"method": "adapt-pruner", "head_metric": None}),
        ({}, {"calibration": {"self_generated": 0}}),
        ({"method": "wanda-sp"}, {"method": "wanda-sp", "sequential_scoring": False}),
        ({"axes": ["layers"], "method": "adapt-pruner", "chooser": "depth.drop_layers", "distance": "blocks.loss_drop"}, {"method": "shortgpt"}),
        ({"method": "wanda", "sparsity": "50%"}, {"method": "magnitude-sparse", "sparsity": "50%"}),
    ],
)  # fmt: skip
def test_the_time_has_all_that_a_run_does(more: dict[str, Any], less: dict[str, Any]) -> None:
    """A repair, heads and blocks that are switched off, text that the model writes, and layers that run twice."""
    common = {"method": "adaptive-ls-v1", "model": str(CONFIGS / "mobilellm-350m"), "device": "cpu"}

    def time_of(asked: dict[str, Any]) -> float:
        budget = {} if "sparsity" in asked else {"budget": "80%"}
        asked = asked | {"calibration": {"source": "python-docs:train"} | asked.get("calibration", {})}
        return float(dry_run(suited(common | budget | asked))["seconds"])

    assert time_of(more) > 1.2 * time_of(less)


def test_a_reduction_that_trains_needs_memory_for_the_model_as_it_begins() -> None:
    asked = {
        "model": str(CONFIGS / "mobilellm-350m"),
        "budget": "50%",
        "device": "cpu",
        "training": {"source": "x", "tokens": "1M"},
    }
    after, during = (dry_run(read(asked | {"method": method})) for method in ("magnitude", "sheared"))
    weights = [planned["memory"]["training"]["of"]["weights"] for planned in (after, during)]
    assert weights == [4 * after["params_after"], 4 * after["params_before"]]
    assert during["seconds"] > 1.2 * after["seconds"]


def test_held_out_text_is_read_at_the_start_too(tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the cuts as well; and the whole of it if nobody limits the windows."""
    monkeypatch.setattr(forecast, "scoring_speed", lambda work: PAPER["cpu"])

    def at_start(max_windows: int | None) -> float:
        evaluation = {"source": str(text_file), "window": 32, "max_windows": max_windows}
        planned = dry_run(read({"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all", "evaluation": evaluation}))
        assert planned["time_without"] == []
        return float(planned["seconds"] - sum(stage["seconds"] for stage in planned["stages"]))

    few, whole = at_start(2), at_start(None)
    assert 0 < 10 * few < whole


def test_factors_of_blocks_take_the_memory_of_whole_backward_passes() -> None:
    """Beside a metric of weights that is all there is; beside gradients of a few layers it may be the most."""

    def planned(**asked: Any) -> dict[str, Any]:
        recipe = {
            "model": str(CONFIGS / "mobilellm-350m"),
            "budget": "80%",
            "device": "cpu",
            "method": "magnitude",
            "calibration": {"source": "text", "self_generated": 0},
        }
        parts: dict[str, Any] = dry_run(read(recipe | asked))["memory"]["pruning"]
        return parts

    without, asked = planned(repair="closed_form.least_squares"), planned(repair="closed_form.least_squares(factors=1)")
    assert "activations" in asked["of"]
    assert asked["of"]["gradients"] == 0
    assert asked["bytes"] > without["bytes"] + 0.9 * asked["of"]["activations"]
    assert planned(repair="closed_form.least_squares(factors=0)") == without
    whole = planned(metric="curvature.kfac")  # the same passes, of whole batches
    assert whole["of"]["activations"] == 2 * asked["of"]["activations"]


def test_the_table_in_the_docs_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of a model differ in processes and how they share, of which its stages do not depend, so they are planned once."""
    plan, planned = start.plan, dict[str, Any]()

    def once(work: Any) -> Any:
        if work.recipe.model not in planned:
            planned[work.recipe.model] = plan(work)
        return planned[work.recipe.model]

    monkeypatch.setattr(start, "plan", once)
    monkeypatch.setattr(start, "load_shapes", functools.cache(start.load_shapes))
    monkeypatch.setattr(sys, "argv", ["scaling_table.py"])
    scaling_table.main()
    assert len(planned) == 3
    printed = capsys.readouterr().out
    assert printed.count("\n") > 10
    assert printed in (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_page_about_a_24_gb_card_says_what_its_dry_run_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "qwen-24gb.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert block is not None
    asked = yaml.safe_load(block[1]) | {"model": str(CONFIGS / "qwen2.5-7b"), "device": "cuda"}

    def gib(**training: Any) -> tuple[float, float]:
        memory = dry_run(read(asked | {"training": asked["training"] | training}))["memory"]
        return tuple(memory[phase]["bytes"] / 2**30 for phase in ("training", "pruning"))  # type: ignore[return-value]

    text = " ".join(page.split())
    training, pruning = gib()
    assert f"Pruning holds about {pruning:.1f} GiB" in text
    assert f"Training holds about {training:.1f} GiB" in text
    assert f"`micro_batch_tokens` it is {gib(micro_batch_tokens=2 * asked['training']['micro_batch_tokens'])[0]:.1f} GiB" in text
    assert f"it would be {gib(lora=None, optimizer='adamw8bit')[0]:.1f} GiB" in text
    plain = {"weights": "float32", "lora": None, "gradient_checkpointing": False, "micro_batch_tokens": None}
    assert f"training would hold {gib(**plain)[0]:.0f} GiB" in text
    assert f"its {dry_run(read(asked))['seconds'] / 60:.0f} minutes are for an H100" in text


def test_the_job_of_the_page_is_a_script_and_its_recipe_fits(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    (job,), (recipe,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("bash", "yaml"))
    assert subprocess.run(["bash", "-n"], input=job, text=True, capture_output=True, check=False).stderr == ""
    command = shlex.split(job[job.index("srun") :].replace("\\\n", " "))
    number = int(re.search(r"--nodes=(\d+)", job)[1]) * int(command[command.index("--nproc-per-node") + 1])  # type: ignore[index]
    (tmp_path / "recipe.yaml").write_text(recipe)
    _, path, *rest = command[command.index("adapt_pruner") + 1 :]
    assert (command[command.index("adapt_pruner") + 1], path, rest) == ("run", "recipe.yaml", ["-o", "runs/70b"])
    planned = read(str(tmp_path / path), overrides=[f"model={CONFIGS / 'llama-3.1-70b'}"])
    gib = {}
    for processes in (8, number, 64):
        plan = dry_run(planned, processes=processes)
        assert plan["too_large"] is None
        gib[processes] = [round(plan["memory"][phase]["bytes"] / 2**30) for phase in ("training", "pruning")]
    assert gib == {8: [74, 15], 16: [51, 15], 64: [33, 15]}, "as the page says"


def test_the_plan_lists_other_places_and_processes() -> None:
    """8B trained in float32: not on a card of 80 GB, wherever the weights lie while it prunes; on eight it is."""
    training = {"source": "text", "tokens": "10M", "batch_tokens": 65_536, "length": 1024}
    keys = {
        "model": str(CONFIGS / "llama-3.1-8b"), "budget": "80%", "device": "cuda", "training": training,
        "calibration": {"source": "text", "self_generated": 0},
    }  # fmt: skip
    plan = dry_run(read(keys))
    ways = [(way["offload"], way["processes"], way["fits"]) for way in plan["ways"]]
    places = [("none", 1, False), ("cpu", 1, False), ("disk", 1, False)]
    assert ways == [*places, ("disk", 2, False), ("disk", 4, False), ("disk", 8, True)]
    assert plan["ways"][0]["bytes"] == plan["peak_bytes"]
    assert plan["ways"][2]["seconds"] > plan["ways"][0]["seconds"], "it reads the weights again and again"
    assert re.search(r"with these settings, a model of about \d\.\d+ B parameters would fit", plan["too_large"])
    pruning = dry_run(read({**keys, "training": {}, "device": "cpu"}))
    assert [way["offload"] for way in pruning["ways"]] == ["none", "cpu", "disk"]


def test_shrink_plans_7b_on_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page about a card of 24 GB says; and on 80 GB of another model nothing changes."""
    keys = {
        "budget": "80%", "dtype": "bfloat16", "device": "cpu", "calibration.source": "text", "calibration.self_generated": 0,
        "training.source": "text", "training.tokens": 10**6, "training.length": 256, "training.batch_tokens": 2048,
    }  # fmt: skip
    monkeypatch.setattr(memory, "usable_bytes", lambda: 24 * 10**9)
    lean = shrink._that_fits(read({}, values=keys | {"model": str(CONFIGS / "qwen2.5-7b")}), trust_remote_code=False)
    assert lean.training.lora is not None
    assert (lean.training.weights, lean.training.lora.rank) == ("bfloat16", 16)
    place, trouble = start.placed(lean, again=True)
    assert (place in ("cpu", "disk"), trouble) == (True, "")
    small = read({}, values=keys | {"model": str(CONFIGS / "qwen2.5-0.5b")})
    assert shrink._that_fits(small, trust_remote_code=False) is small
