"""Memory and time by formula: held against a process that really trains, and against counts by hand."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.core import layerwise, loss
from adapt_pruner.core.precision import native_bfloat16
from adapt_pruner.data import windows
from adapt_pruner.recipe import read
from adapt_pruner.run import estimate
from adapt_pruner.run.estimate import PAPER, Setup, held, operations, pruning_memory, seconds, shapes, training_memory
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.score.calibrate import Evidence, score
from adapt_pruner.score.weights import taylor
from adapt_pruner.train import loop
from adapt_pruner.train.objectives import lm
from conftest import LAYOUTS, tiny_model

CONFIGS = Path(__file__).parent / "configs"

MEASURE = """
import gc, json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from adapt_pruner import families
from adapt_pruner.core import world
from functools import partial
from adapt_pruner.score.calibrate import mean_loss, score
from adapt_pruner.score.weights import taylor
from adapt_pruner.train.kernels import kernels
from adapt_pruner.data.fixed import Fixed
from adapt_pruner.train.loop import How, Progress, make_optimizer, steps
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.spread import spread

torch.set_num_threads(1)
asked = json.loads(sys.argv[1])

class Rows:
    def __init__(self, ids):
        self.ids = ids
    def __len__(self):
        return len(self.ids)
    def batch(self, start, stop):
        return self.ids[start:stop], None
    def num_tokens(self, start, stop):
        return (stop - start) * self.ids.shape[1]

def go(config, rows, length, micro):
    model = LlamaForCausalLM(LlamaConfig(**config))
    ids = torch.randint(3, config["vocab_size"], (2 * rows, length))
    if asked["phase"] == "reading":
        mean_loss(model, list(ids[:4].split(1)), dtype=asked["dtype"])
        return occupied("VmHWM")
    if asked["phase"] in ("pruning", "samples"):
        axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads")]  # what a recipe scores by default
        score(model, axes, list(ids[:4].split(1)), metrics=[taylor if asked["phase"] == "pruning" else partial(taylor, form="second")], dtype=asked["dtype"])
        return occupied("VmHWM")
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.0)
    how = {"gradient_checkpointing": asked["checkpointing"], "compiled": False, "liger": False}
    with spread(model, optimizer, dtype=asked["dtype"]) as (working, its_optimizer), kernels(working, **how):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is counted from here on
        how = How(lm, lambda share: 1.0, lr=1e-4, batch_rows=rows, micro_tokens=micro, dtype=asked["dtype"])
        for step in steps(working, Fixed(Rows(ids)), its_optimizer, Progress(), how, until=2 * rows):
            step.take()
        return occupied("VmHWM")

def occupied(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

with world.joined():
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    go(asked["config"] | small | {"vocab_size": 128}, 4, 16, 16)  # what libraries load on first use
    gc.collect()
    before = occupied("VmRSS")
    peak = go(asked["config"], asked["rows"], asked["length"], asked["micro"])
    if world.is_main():
        print(peak - before)
"""

WIDE = {  # 60 M parameters: the states are most of it
    "vocab_size": 16_384, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 10,
    "num_key_value_heads": 5, "tie_word_embeddings": True,
}  # fmt: skip
DEEP = WIDE | {"vocab_size": 2048, "tie_word_embeddings": False}  # so are the layers
LONG = WIDE | {  # for more tokens: the activations are
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


EVIDENCE = {"pruning": Evidence.GRADIENTS, "samples": Evidence.SAMPLE_GRADIENTS, "reading": Evidence.FORWARD}
"""What is seen in the phases of pruning that are measured."""

FEW = 32
"""Tokens that a processor without bfloat16 still reads in half a minute: torch multiplies one element after another there."""


def skip_if_slow(how: Setup) -> None:
    if how.narrow and (how.micro_tokens > FEW or how.processes > 1) and not native_bfloat16(torch.device("cpu")):
        pytest.skip(
            "this processor has no bfloat16: minutes; the same formulas are measured in float32 and, on few tokens, in bfloat16"
        )


def measured(asked: dict[str, Any], environment: dict[str, str], script: Path, processes: int) -> int:
    """Bytes by which a fresh process grows at its peak."""
    script.write_text(MEASURE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(asked)],
        capture_output=True, text=True, check=False, env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


def of_config(config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return shapes(LlamaForCausalLM(LlamaConfig(**config)))


def grown_and_foreseen(
    phase: str, config: dict[str, Any], how: Setup, script: Path, **environment: str
) -> tuple[int, dict[str, int]]:
    of, dtype = of_config(config), "bfloat16" if how.narrow else "float32"
    asked = {
        "phase": phase, "config": config, "dtype": dtype, "micro": how.micro_tokens, "length": how.length,
        "rows": how.batch_tokens // how.length, "checkpointing": how.checkpointing,
    }  # fmt: skip
    grown = measured(asked, environment, script, how.processes)
    if phase in EVIDENCE:
        return grown, pruning_memory(of, how, samples=4, length=how.length, moments=False, evidence=EVIDENCE[phase])
    return grown, training_memory(of, how)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("phase", "config", "how"),
    [
        ("training", WIDE, Setup("cpu", False, 64, 128, 256)),
        ("training", DEEP, Setup("cpu", True, 32, 32, 64)),
        ("training", LONG, Setup("cpu", False, 64, 2048, 4096, checkpointing=True)),
        ("training", WIDE, Setup("cpu", True, 32, 32, 64, checkpointing=True)),
        ("training", WIDE, Setup("cpu", True, 64, 128, 512, processes=2, parallel="fsdp")),
        ("training", LONG, Setup("cpu", False, 64, 2048, 4096)),
        ("training", LONG, Setup("cpu", True, 64, 2048, 4096)),
        ("pruning", WIDE, Setup("cpu", True, 256, 256, 512)),
        ("samples", WIDE, Setup("cpu", False, 256, 256, 512)),
        ("reading", WIDE, Setup("cpu", True, 256, 256, 512)),
    ],
    ids=[
        "states",
        "copies",
        "checkpointing",
        "checkpointing-bfloat16",
        "fsdp",
        "activations",
        "activations-bfloat16",
        "pruning",
        "samples",
        "reading",
    ],
)
def test_a_process_asks_for_what_the_formulas_say(phase: str, config: dict[str, Any], how: Setup, tmp_path: Path) -> None:
    """With an allocator that gives back what is freed, within 6 %."""
    skip_if_slow(how)
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    grown, parts = grown_and_foreseen(phase, config, how, tmp_path / "measure.py", **gives_back)
    assert sum(parts.values()) == pytest.approx(grown, rel=0.06), parts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("config", "how"),
    [(WIDE, Setup("cpu", True, 32, 32, 64)), (LONG, Setup("cpu", True, 64, 2048, 4096))],
    ids=["states", "activations"],
)
def test_a_process_holds_what_is_foretold(config: dict[str, Any], how: Setup, tmp_path: Path) -> None:
    """As it comes, with what glibc keeps, within 15 %."""
    skip_if_slow(how)
    grown, parts = grown_and_foreseen("training", config, how, tmp_path / "measure.py")
    assert held(parts, "cpu") - held({}, "cpu") == pytest.approx(grown, rel=0.15), parts


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
    assert alone["copies"] == 2 * (of.decoder + of.head)
    streams = pruning_memory(of, how, **asked, evidence=Evidence.STREAM_GRADIENTS)
    samples = pruning_memory(of, how, **asked, evidence=Evidence.SAMPLE_GRADIENTS)
    assert streams["gradients"] == 0
    assert samples["gradients"] == samples["squares"] == 4 * of.decoder
    assert sum(samples.values()) - sum(streams.values()) == 8 * of.decoder


def test_time_is_operations_and_what_is_sent() -> None:
    of, speed = of_config(WIDE), PAPER["cuda"]
    alone = Setup("cuda", True, 1024, 4096, 65_536)
    tokens = {"scored": 0, "trained": 655_360, "read": 0}
    one = seconds(of, alone, speed, **tokens)
    assert one == pytest.approx(655_360 * operations(of, alone, kind="train") / speed.flops)
    eight = replace(alone, processes=8)
    assert seconds(of, eight, speed, **tokens) == pytest.approx(one / 8 + 10 * 8 * of.params * 7 / 8 / speed.near)
    sharded = replace(eight, parallel="fsdp")  # 10 steps of 2 passes
    assert seconds(of, sharded, speed, **tokens) == pytest.approx(one / 8 + 20 * 8 * of.params * 7 / 8 / speed.near)
    far = replace(alone, processes=16)
    assert seconds(of, far, speed, **tokens) == pytest.approx(one / 16 + 10 * 8 * of.params * 15 / 16 / speed.far)
    taught, frozen = (replace(alone, **change) for change in ({"teacher": of}, {"lora": 8}))
    assert seconds(of, taught, speed, **tokens) == pytest.approx(one * 4 / 3)
    assert seconds(of, frozen, speed, **tokens) == pytest.approx(one * 2 / 3)


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
        ({}, ["KV heads shut one by one"]),
        ({"axes": ["neurons"]}, []),
        ({"method": "best"}, ["text that the model writes itself", "KV heads shut one by one", "repair"]),
        ({"method": "wanda-sp"}, ["measuring behind pruned layers"]),
        (
            {"axes": ["layers"], "chooser": "depth.drop_layers", "distance": "blocks.loss_drop"},
            ["layers or blocks shut one by one"],
        ),
        ({"head_metric": None, "evaluation": {"tasks": "piqa"}}, ["tasks"]),
        ({"head_metric": None, "calibration": {"source": "self"}}, ["text that the model writes itself"]),
        ({"head_metric": None, "calibration": {"own": 4}}, []),
        ({"method": "magnitude", "calibration": {"source": "self"}}, []),
        ({"method": "slicegpt"}, []),
    ],
)
def test_a_plan_names_what_its_time_leaves_out(asked: dict[str, Any], left_out: list[str]) -> None:
    common = {"method": "adapt-pruner", "model": str(CONFIGS / "mobilellm-350m"), "budget": "80%", "device": "cpu"}
    planned = dry_run(read(common | asked))
    assert planned["time_without"] == left_out


def test_factors_of_blocks_take_the_memory_of_whole_backward_passes() -> None:
    """Beside a metric of weights that is all there is; beside gradients of a few layers it may be the most."""

    def planned(**asked: Any) -> dict[str, Any]:
        recipe = {"model": str(CONFIGS / "mobilellm-350m"), "budget": "80%", "device": "cpu", "method": "magnitude"}
        parts: dict[str, Any] = dry_run(read(recipe | asked))["memory"]["pruning"]
        return parts

    without, asked = planned(repair="closed_form.least_squares"), planned(repair="closed_form.least_squares(factors=1)")
    assert "activations" in asked["of"]
    assert asked["of"]["gradients"] == 0
    assert asked["bytes"] > without["bytes"] + 0.9 * asked["of"]["activations"]
    assert planned(repair="closed_form.least_squares(factors=0)") == without
    whole = planned(metric="curvature.kfac")  # the same passes, of whole batches
    assert whole["of"]["activations"] == 2 * asked["of"]["activations"]


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    root = Path(__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, root / "benchmarks" / "scaling_table.py"], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    assert printed.count("\n") > 10
    assert printed in (root / "docs" / "scaling.md").read_text(encoding="utf-8")
