"""Memory that the formulas foresee, beside what tensors take and what a process grows by, on this machine.

    python benchmarks/memory_foreseen.py [CASE …]

Foreseen: the sum of `training_memory`, `pruning_memory` or `repair_memory`. Tensors: the bytes of all tensors that live at one time, at the most. The code
decides them, so they are the same on every machine; tests/test_forecast.py holds the formulas against them, on smaller models. Grown: the
peak of a fresh process on one core, less what it held before it had a model, with an allocator that gives back what is freed, and as it comes,
for which `process_bytes` is what is foreseen. A process has more than its tensors: oneDNN packs matrices into buffers of its own, most of them for AMX
tiles, and glibc keeps some of what is freed. Processor, allocator and load decide that, so nothing is asserted here.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import weakref
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.moments import is_quantised
from adapt_pruner.core.model.precision import native_bfloat16
from adapt_pruner.core.system import world
from adapt_pruner.data.fixed import Fixed
from adapt_pruner.reduce.repair.closed_form import least_squares
from adapt_pruner.run.estimate import Setup, process_bytes, pruning_memory, repair_memory, shapes, training_memory
from adapt_pruner.score.calibrate import Evidence, mean_loss, score
from adapt_pruner.score.weights import taylor
from adapt_pruner.train.kernels import kernels, stored_as
from adapt_pruner.train.loop import TrainConfig, TrainState, make_optimizer, steps
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.spread import spread

EVIDENCE = {"pruning": Evidence.GRADIENTS, "samples": Evidence.SAMPLE_GRADIENTS, "reading": Evidence.FORWARD}
"""What is seen in the phases that score."""
REPAIRS: dict[str, dict[str, Any]] = {"repair": {"ridge": 0.3}, "repair-twice": {"ridge": None, "sequential": True}}
"""Options of a least-squares repair in the phases that repair."""
SAMPLES = 4
"""Rows of calibration text, where a case does not say more."""


@dataclass(frozen=True)
class Case:
    """A phase of a run: `training` or one of `EVIDENCE` or `REPAIRS`, of a Llama with this config."""

    phase: str
    config: dict[str, Any]
    how: Setup
    samples: int = SAMPLES


WIDE = {  # 60 M parameters: the states are most of it
    "vocab_size": 16_384, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 10,
    "num_key_value_heads": 5, "tie_word_embeddings": True,
}  # fmt: skip
DEEP = WIDE | {"vocab_size": 2048, "tie_word_embeddings": False}  # so are the layers
LONG = WIDE | {  # for more tokens: the activations are
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CASES = {
    "states": Case("training", WIDE, Setup("cpu", False, 64, 128, 256)),
    "copies": Case("training", DEEP, Setup("cpu", True, 32, 32, 64)),
    "tied-copies": Case("training", WIDE, Setup("cpu", True, 32, 32, 64)),
    "checkpointing": Case("training", LONG, Setup("cpu", False, 64, 2048, 4096, checkpointing=True)),
    "checkpointing-bfloat16": Case("training", WIDE, Setup("cpu", True, 32, 32, 64, checkpointing=True)),
    "fsdp": Case("training", WIDE, Setup("cpu", True, 64, 128, 512, processes=2, parallel="fsdp")),
    "activations": Case("training", LONG, Setup("cpu", False, 64, 2048, 4096)),
    "activations-bfloat16": Case("training", LONG, Setup("cpu", True, 64, 2048, 4096)),
    "8-bit": Case("training", WIDE, Setup("cpu", True, 64, 128, 256, stored=2, bits=8)),
    "4-bit-in-backward": Case("training", WIDE, Setup("cpu", True, 64, 128, 128, stored=2, bits=4, in_backward=True)),
    "pruning": Case("pruning", WIDE, Setup("cpu", True, 256, 256, 512)),
    "samples": Case("samples", WIDE, Setup("cpu", False, 256, 256, 512)),
    "reading": Case("reading", WIDE, Setup("cpu", True, 256, 256, 512)),
    "repair": Case("repair", WIDE, Setup("cpu", True, 256, 256, 512)),
    "repair-twice": Case("repair-twice", WIDE, Setup("cpu", True, 256, 256, 512), samples=16),
}


class Gauge(Protocol):
    """Tells the most bytes since it began."""

    def begin(self) -> None: ...

    def most(self) -> int: ...


class Tensors(TorchDispatchMode):
    """A gauge of the tensors that are made while it is entered: of all that live at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again, as what it does with the shares
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor) and not is_quantised(tensor):  # which is seen as its codes and scales
                made = tensor.untyped_storage()
                if made.device.type != "meta":  # what DTensor tries its shapes with
                    self._alive[made._cdata] = weakref.ref(made)
        living = {key: storage for key, ref in self._alive.items() if (storage := ref()) is not None}
        self._alive = {key: self._alive[key] for key in living}
        self._most = max(self._most, sum(storage.nbytes() for storage in living.values()))  # FSDP resizes them
        return given

    def begin(self) -> None:
        self._most = 0

    def most(self) -> int:
        return self._most


class Process:
    """A gauge of this process, on Linux."""

    def __init__(self) -> None:
        gc.collect()
        self._before = _resident("VmRSS")

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int:
        return _resident("VmHWM") - self._before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class Rows:
    """Training text of random ids."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, start: int, stop: int) -> tuple[Tensor, None]:
        return self.ids[start:stop], None

    def num_tokens(self, start: int, stop: int) -> int:
        return (stop - start) * self.ids.shape[1]


def foreseen(case: Case) -> dict[str, int]:
    """What the formulas say, by what it holds."""
    with torch.device("meta"):
        of = shapes(LlamaForCausalLM(LlamaConfig(**case.config)))
    asked: dict[str, Any] = {"samples": case.samples, "length": case.how.length, "moments": False}
    if case.phase in REPAIRS:
        options = REPAIRS[case.phase]
        return repair_memory(of, case.how, **asked, chosen=options["ridge"] is None, sequential=options.get("sequential", False))
    if case.phase in EVIDENCE:
        return pruning_memory(of, case.how, **asked, evidence=EVIDENCE[case.phase])
    return training_memory(of, case.how)


def most_bytes(case: Case, gauge: Gauge) -> int:
    """Do the phase, training two steps of it, and return the most bytes meanwhile."""
    how, rows = case.how, case.how.batch_tokens // case.how.length
    dtype = "bfloat16" if how.narrow else "float32"
    model = LlamaForCausalLM(LlamaConfig(**case.config))
    if case.phase in (*EVIDENCE, *REPAIRS):
        batches = list(torch.randint(3, case.config["vocab_size"], (case.samples, how.length)).split(1))
        gauge.begin()
        if case.phase in REPAIRS:
            whole = families.axes(model)
            first = {axis.name: torch.arange(axis.entries) > 0 for axis in whole if axis.kind in ("neurons", "kv_heads")}
            least_squares(model, whole, Mask(first), batches, dtype=dtype, **REPAIRS[case.phase])
        elif case.phase == "reading":
            mean_loss(model, batches, dtype=dtype)
        else:
            axes = [
                axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads")
            ]  # what a recipe scores by default
            metric = taylor if case.phase == "pruning" else partial(taylor, form="second")
            score(model, axes, batches, metrics=[metric], dtype=dtype)
        return gauge.most()
    ids = torch.randint(3, case.config["vocab_size"], (2 * rows, how.length))
    lowbit = how.bits < 32 or how.stored == 2
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.0, bits=how.bits, torchao="this case" if lowbit else None)
    kernel = {"gradient_checkpointing": how.checkpointing, "compiled": False, "liger": False}
    weights = torch.bfloat16 if how.stored == 2 else torch.float32
    spread_out = spread(model, optimizer, dtype=dtype, weights=weights)
    with stored_as(model, weights), spread_out as (working, its_optimizer), kernels(working, **kernel):
        gauge.begin()
        training = TrainConfig(
            lm, lambda share: 1.0, lr=1e-4, batch_rows=rows, micro_tokens=how.micro_tokens, dtype=dtype, in_backward=how.in_backward,
            clip=math.inf if how.in_backward else 1.0,
        )  # fmt: skip
        feed = Fixed(cast(Any, Rows(ids)))
        for step in steps(working, feed, its_optimizer, TrainState(), training, until=2 * rows):
            step.take()
        return gauge.most()


def _child(asked: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    case = Case(asked["phase"], asked["config"], Setup(**asked["how"]), asked["samples"])
    with world.joined(lost=lambda sentence: os.abort()):
        if asked["tensors"]:
            with Tensors() as tensors:
                most = most_bytes(case, tensors)
        else:
            small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
            tiny = case.config | small | {"num_key_value_heads": 2, "vocab_size": 128}
            batch = 16 * 4 * case.how.processes
            warm = Setup(
                "cpu", case.how.narrow, 16, 16, batch, case.how.checkpointing, processes=case.how.processes, parallel="fsdp"
            )
            most_bytes(Case(case.phase, tiny, warm), Process())  # what libraries load on first use
            most = most_bytes(case, Process())
        if world.is_main():
            print(most)


def apart(case: Case, *, tensors: bool, **environment: str) -> int:
    """The most bytes of a fresh process, or of the first of several: of its tensors, or by which it grows."""
    number = str(case.how.processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number] if case.how.processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--child", json.dumps(asdict(case) | {"tensors": tensors})],
        capture_output=True, text=True, env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.splitlines()[-1])


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    native = "native" if native_bfloat16(torch.device("cpu")) else "not native"
    libc = " ".join(platform.libc_ver())
    return f"{name}, {'with' if amx else 'without'} AMX, bfloat16 {native}, {libc}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; by default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        _child(json.loads(asked.child))
        return
    unknown = set(asked.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"{_machine()}; MB, and what is foreseen less that in per cent")
    print(f"{'case':24}{'foreseen':>10}{'tensors':>18}{'grown, given back':>20}{'held':>10}{'grown':>18}")
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in asked.cases or CASES:
        case = CASES[name]
        parts = foreseen(case)
        asked_for, kept = sum(parts.values()), process_bytes(parts, "cpu") - process_bytes({}, "cpu")
        found = [apart(case, tensors=True), apart(case, tensors=False, **gives_back), apart(case, tensors=False)]
        said = [
            f"{most / 1e6:.1f} ({told / most - 1:+.1%})" for most, told in zip(found, (asked_for, asked_for, kept), strict=True)
        ]
        print(f"{name:24}{asked_for / 1e6:10.1f}{said[0]:>18}{said[1]:>20}{kept / 1e6:10.1f}{said[2]:>18}", flush=True)


if __name__ == "__main__":
    main()
