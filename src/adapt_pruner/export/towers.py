"""ONNX graphs of the two towers of a model, apart: an engine embeds pictures once and captions as they come.

text_model.onnx      input_ids int64 [batch, length] -> embeds float32 [batch, width], of length 1
vision_model.onnx    pixel_values float32 [batch, 3, height, width] -> embeds float32 [batch, width], of length 1
config.json, tokenizer*, processor_config.json
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.errors import RunError, first_line

GRAPHS = {"text_model.onnx": "input_ids", "vision_model.onnx": "pixel_values"}
"""File of a tower -> its input."""
_TOLERANCE = 1e-4  # largest difference of a number of an embedding, which is of length 1


class _Embeds(nn.Module):
    def __init__(self, read: Callable[..., Any], model: Any) -> None:
        super().__init__()
        self.model, self._read = model, read

    def forward(self, given: Tensor) -> Tensor:
        output = self._read(given)
        return F.normalize(getattr(output, "pooler_output", output), dim=-1)


def write_graph(module: nn.Module, path: Path, inputs: dict[str, Tensor], output: str, dynamic: dict[str, Any]) -> None:
    """Trace a module and write its ONNX graph.

    Args:
        module: what is traced.
        path: the file.
        inputs: name in the graph -> example, in the order of the module's arguments.
        output: name of the output.
        dynamic: argument of the module -> its axes that may have other sizes.

    Raises:
        RunError: torch cannot trace it.
    """
    try:
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs), output_names=[output],
            dynamic_shapes=dynamic,
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # torch wraps its exporter's errors in these
        raise RunError(f"torch cannot export this model to ONNX: {first_line(error)}") from error
    assert program is not None
    program.save(path)


def write_graphs(loaded: Loaded, folder: Path, *, session: Callable[[Path], Any]) -> None:
    """Write the graphs of both towers into a folder, after onnxruntime has computed the same embeddings.

    Raises:
        RunError: torch cannot trace a tower, or onnxruntime computes something else.
    """
    model = loaded.model
    vision = model.config.vision_config
    text = torch.full((2, min(8, model.config.text_config.max_position_embeddings)), model.config.text_config.eos_token_id)
    if hasattr(model, "logit_bias"):  # SigLIP reads all of its places
        text = text[:, :1].expand(2, model.config.text_config.max_position_embeddings).contiguous()
    pixels = torch.zeros(2, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    for (file, name), given, read in zip(
        GRAPHS.items(), (text, pixels), (model.get_text_features, model.get_image_features), strict=True
    ):
        tower = _Embeds(read, model).eval()
        axes = {0: torch.export.Dim("batch", min=1, max=65_536)}
        if name == "input_ids" and not hasattr(model, "logit_bias"):
            axes[1] = torch.export.Dim("length", min=1, max=model.config.text_config.max_position_embeddings)
        write_graph(tower, folder / file, {name: given}, "embeds", {"given": axes})
        _check(tower, session(folder / file), name, given)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("auto_map", None)
    config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check(tower: nn.Module, opened: Any, name: str, given: Tensor) -> None:
    """Refuse a graph that computes something else than the model, of random input of another batch size than that of tracing."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, *given.shape[1:])
    some = torch.randn(shape, generator=generator)
    if name == "input_ids":
        some = torch.randint(3, int(given.max()) + 50, shape, generator=generator)
        some[:, -1] = given.max()
    (embeds,) = opened.run(None, {name: some.numpy()})
    difference = float((torch.from_numpy(embeds) - tower(some)).abs().max())
    if not difference <= _TOLERANCE:
        raise RunError(
            f"the graph of {name} differs from the model by {difference:.1e} (at most {_TOLERANCE:.0e}); nothing was written"
        )


def loading() -> Iterator[str]:
    """Commands for the card that use ONNX Runtime."""
    yield (
        "**ONNX Runtime**:\n\n```python\nimport onnxruntime\nfrom PIL import Image\nfrom transformers import AutoProcessor\n\n"
        'processor = AutoProcessor.from_pretrained(".")  # where this file lies\n'
        'inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.jpg"), padding="max_length", return_tensors="np")\n'
        'text, vision = (onnxruntime.InferenceSession(f"{tower}_model.onnx") for tower in ("text", "vision"))\n'
        '(captions,) = text.run(None, {"input_ids": inputs["input_ids"]})\n'
        '(pictures,) = vision.run(None, {"pixel_values": inputs["pixel_values"]})\n'
        "print(pictures @ captions.T)  # cosines\n```"
    )
