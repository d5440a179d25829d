"""Zeros on a CPU in an engine that skips them: DeepSparse 1.8.0, the last with an engine, beside ONNX Runtime, on layers of SmolLM2's sizes.

    python3.11 -m venv ds && ds/bin/pip install deepsparse==1.8.0 onnxruntime 'numpy<2'     # an environment of its own, without adapt-pruner
    NM_DISABLE_ANALYTICS=True ds/bin/python benchmarks/sparse_cpu.py

Eight linear layers, 576 → 1,536 → 576 and so on, with ReLU between them, random float32 weights, one thread. Zeros are the smallest weights of a
matrix, or the two smallest of every four inputs. A line is the median of 15 passes of 512 rows (reading a prompt) or one row (writing a token).
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS = [(576, 1536), (1536, 576)] * 4
ZEROS = ("none", "50%", "2:4", "90%")
PASSES = 15


def made(zeros: str) -> Any:
    """The model as ONNX."""
    rng, nodes, weights, entering = np.random.default_rng(0), [], [], "x"
    for number, shape in enumerate(LAYERS):
        weight = rng.standard_normal(shape).astype(np.float32) * 0.03
        if zeros == "2:4":
            groups = weight.reshape(shape[0] // 4, 4, shape[1])
            weight = (groups * (np.abs(groups).argsort(1).argsort(1) >= 2)).reshape(shape)
        elif zeros != "none":
            weight[np.abs(weight) < np.quantile(np.abs(weight), float(zeros[:-1]) / 100)] = 0
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [entering, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Relu", [f"m{number}"], [f"r{number}"]))
        entering = f"r{number}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 576]) for name in ("x", entering)]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    return model


def milliseconds(run: Callable[[], object]) -> float:
    """The median of some passes, after one that does not count."""
    run()
    took = []
    for _ in range(PASSES):
        began = time.perf_counter()
        run()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def main() -> None:
    from deepsparse import Engine

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    print("| rows | zeros | DeepSparse, ms | ONNX Runtime, ms |\n|---:|---|---:|---:|")
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "layers.onnx")
        for rows in (512, 1):
            for zeros in ZEROS:
                onnx.save(made(zeros), path)
                x = np.random.default_rng(1).standard_normal((rows, 576)).astype(np.float32)
                engine = Engine(model=path, batch_size=rows, num_cores=1)
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                runs: tuple[Callable[[], object], ...] = (lambda: engine.run([x]), lambda: session.run(None, {"x": x}))  # noqa: B023
                each = " | ".join(f"{milliseconds(run):.2f}" for run in runs)
                print(f"| {rows} | {zeros} | {each} |", flush=True)


if __name__ == "__main__":
    main()
