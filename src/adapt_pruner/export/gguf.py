"""A GGUF file for llama.cpp and tools built on it; layers may differ in size where llama.cpp can hold that.

Most architectures of llama.cpp read sizes per layer but then size every tensor as in layer 0. Two do not. `deci` is a plain Llama
that also takes the biases of Qwen2. `openelm` normalises queries and keys as Qwen3 does, and has tied embeddings only. So

    all layers alike                       the model's own architecture
    Llama, Mistral, Qwen2 layouts          deci
    Qwen3 with tied embeddings             openelm
    Qwen3 untied, Gemma 3                  its own, every layer zero-padded to the widest
    experts (Mixtral, Qwen3-MoE)           its own; layers that differ are refused

The weights come one by one from the checkpoint's files and go into the file in their final type. Only k-quants, and the head beside
other types of 4 and 5 bits, are left to llama.cpp, which makes the file from one that has them as stored.

Quantised matrices consist of blocks of 32 numbers in a row (256 for k-quants). A `ffn_down` whose rows are not whole blocks would
stay in F16. So if the file will be quantised here, MLPs are padded with zero neurons to a multiple of 32. `pad` pads a float file
that will be quantised later, to multiples of 32 or, for k-quants, of 256. A model with a layer that lacks its attention or MLP is
refused, because `deci` forgets the attention of such a layer. `deci` and `llama` rotate pairs of neighbouring rows of queries and
keys, where Hugging Face pairs the two halves of a head; so these rows are reordered.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.origin import origin
from adapt_pruner.checkpoint.save import check_finite, or_unwritten, unwritten
from adapt_pruner.checkpoint.stored import weights_of
from adapt_pruner.core.events.words import millions
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.system.files import check_place, file_beside, is_there, lacks_disk_space, whole_file, write_whole
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.data.generation import ends_of
from adapt_pruner.errors import RunError, UsageError, first_line, nearest, settings
from adapt_pruner.export import llama_cpp
from adapt_pruner.export.engines import Engine
from adapt_pruner.export.gguf_tokenizer import add_tokenizer
from adapt_pruner.export.loading import GGUF_TYPES, LLAMAS, misread, not_computed, ropes_of
from adapt_pruner.export.padding import LayerSizes, check_layers, kinds_by_layer, layer_sizes, widening, widest

ABOUT = "one file for llama.cpp and what is built on it"

LAZY = True
_NAME = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # which the gguf library makes, to the last bit as llama.cpp does
QUANTS = (
    *_NAME.values(), "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s",
    "q2_k",
)  # fmt: skip
"""Types of stored matrices."""

PADS = (32, 256)
"""Block sizes of quantised rows, the second for k-quants; MLPs may be padded to multiples of them."""
_BLOCK, _K_BLOCK = PADS
_AT_ONCE = 2**22  # the numbers of a matrix that are converted together
_HEADS = ("output.weight", "token_embd.weight")  # the second if there is no first
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """The architecture that a file is written for, and the sizes of its layers."""

    arch: str
    sizes: tuple[LayerSizes, ...]
    head_dim: int
    experts: int = 0

    @property
    def pairs_neighbours(self) -> bool:
        return self.arch in ("llama", "deci")


def write(loaded: Loaded, path: Path, *, quant: str | None = None, pad: int | None = None) -> list[str]:
    """Write `loaded` as one GGUF file with its tokenizer, chat template and special tokens.

    Args:
        loaded: the model in float32, or without its weights (`checkpoint.stored`).
        path: a file that does not exist.
        quant: one of `QUANTS`; None for the checkpoint's type. Norms and biases are always float32.
        pad: one of `PADS`; None for 32 if the file is quantised, and no padding otherwise.

    Raises:
        UsageError: the file exists, a library is missing, or llama.cpp has no place for something in the model.
        RunError: the file could not be written; nothing is left there.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"GGUF files are written with the gguf library, which is not installed; {to_install('gguf')}") from error
    quant = quant.lower() if quant else _NAME.get(loaded.dtype, "f32")
    if quant not in QUANTS:
        raise UsageError(f"quantisation {quant!r} is not known; {nearest(quant, QUANTS)}")
    if pad is not None and pad not in PADS:
        raise UsageError(f"pad {pad} is not a block size of llama.cpp's types; use {' or '.join(map(str, PADS))}")
    if is_there(path):
        raise UsageError(f"{path} exists; name another file or remove it first")
    if path.suffix != ".gguf":
        raise UsageError(f"{path} does not end in .gguf, which tools look for; name it {path.name}.gguf")
    check_place(path)
    quantised = quant not in _NAME.values()
    plan, notes = _planned(loaded.model, multiple=pad or (_BLOCK if quantised else 1))
    valueless, read = weights_of(loaded)
    shapes = dict(_tensors(loaded.model, plan, valueless.__getitem__))
    entries, left = _entries(gguf, shapes, quant)
    if left:
        llama_cpp.library()  # fails before any work is done
    first = sum(entry.num_bytes for entry in entries.values())
    last = count_parameters(loaded.model) * (int(quant[1]) + 1) // 8 if left else 0  # about what llama.cpp writes
    if reason := lacks_disk_space(path, first + last, largest=first):
        raise unwritten(path, reason)
    if quantised:
        notes += _left_wide(shapes, quant)
    limit = {"f16": torch.float16, "bf16": torch.bfloat16}.get(quant, torch.float32)

    def finite(name: str) -> Tensor:
        weight = read(name)
        check_finite(path, {name: weight}, dtype=limit)
        return weight

    with or_unwritten(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, file_beside(path) if left else nullcontext(partial) as target:
            notes += _write(gguf, loaded, target, plan, quant, entries, finite)
            if left:
                llama_cpp.quantise(target, partial, quant)
            if os.path.lexists(path):
                rescued = partial.rename(path.with_name(f"{path.stem}-{partial.name[-8:]}{path.suffix}"))
                raise RunError(f"another program wrote {path} meanwhile; the complete result is in {rescued}")
    with suppress(OSError):  # the model is worth more than how to name it to Ollama
        write_whole(path.with_suffix(".Modelfile"), _modelfile(loaded, path))
    return notes


def _modelfile(loaded: Loaded, path: Path) -> str:
    """What `ollama create` reads beside the file: where it is, and with which tokens a turn ends. The chat template is in the file."""
    ends = ends_of(loaded.model, loaded.tokenizer)
    stops = [loaded.tokenizer.convert_ids_to_tokens(end) for end in ends if end < len(loaded.tokenizer)]
    lines = [
        f"# ollama create {path.stem} -f {path.stem}.Modelfile",
        f"FROM ./{path.name}",
        *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def holds(artefact: Path) -> bool:
    """Whether it is a GGUF file, judged by its name."""
    return artefact.is_file() and artefact.suffix == ".gguf"


def loading(config: Mapping[str, Any]) -> Iterator[str]:
    """Nothing, because a single file has no card."""
    yield from ()


@contextmanager
def opened(artefact: Path, *, context: int, trust_remote_code: bool) -> Iterator[Engine]:
    """The file in llama.cpp, with a float32 cache, so that only the weights differ.

    Raises:
        UsageError: llama-cpp-python is not installed.
        RunError: llama.cpp cannot load it.
    """
    module, errors = llama_cpp.library()
    try:
        with llama_cpp.plain_kernels(module):
            llama = module.Llama(
                str(artefact), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, type_k=module.GGML_TYPE_F32,
                type_v=module.GGML_TYPE_F32, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
                n_gpu_layers=0, verbose=False,
            )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        why = "; ".join(errors[-2:]) or first_line(error)
        raise RunError(f"llama.cpp cannot load {artefact}: {why}; export it again") from error

    def logits(ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    def greedy(ids: list[int], count: int) -> list[int]:
        llama.reset()
        llama.eval(ids)
        continuation: list[int] = []
        while True:
            continuation.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            if len(continuation) == count:
                return continuation
            llama.eval(continuation[-1:])

    kind = int(llama.metadata.get("general.file_type", 0))
    stored = next((quant for quant, value in llama_cpp.file_types(module).items() if value == kind), "f32")
    try:
        yield Engine(
            f"llama.cpp ({llama.metadata['general.architecture']})", stored, llama.n_vocab(), logits, written=greedy,
            encode=lambda text: llama.tokenize(text.encode(), add_bos=True, special=True),
        )  # fmt: skip
    finally:
        llama.close()


def _planned(model: Any, *, multiple: int) -> tuple[_Plan, list[str]]:
    """The architecture that holds the model and the sizes of its layers, with MLPs padded to a multiple of `multiple`.

    Raises:
        UsageError: no architecture holds the model.
    """
    config = model.config
    check_layers(config, "llama.cpp")
    if config.model_type not in GGUF_TYPES:
        raise UsageError(f"models of type {config.model_type!r} have no GGUF form here; known: {', '.join(GGUF_TYPES)}")
    if (trouble := not_computed(config.to_dict(), config.model_type)) is not None:
        raise UsageError(f"llama.cpp cannot hold this model: {trouble}; use the form padded, or try onnx")
    notes = []
    if hasattr(model.model.layers[0].mlp, "experts"):
        sizes, experts = _of_experts(model)
    else:
        sizes, experts = layer_sizes(model), 0
        sizes = [replace(size, neurons=-(-size.neurons // multiple) * multiple) for size in sizes]
    arch, head_dim = GGUF_TYPES[config.model_type], model.model.layers[0].self_attn.head_dim
    extra_biases = bool(getattr(config, "output_bias", False))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if extra_biases and config.model_type not in LLAMAS:
        raise UsageError(
            f"llama.cpp has no place for the biases that a repair gave this {arch} model; export it to onnx, or prune with {settings({'repair': None})}"
        )
    # llama.cpp's qwen2 has queries as wide as the stream, and no rope of Llama 3.
    llama3 = any(rope.get("rope_type") == "llama3" for rope in ropes_of(config.rope_parameters))
    unfit = arch == "qwen2" and (llama3 or sizes[0].heads * head_dim != config.hidden_size)
    if len(set(sizes)) > 1 or extra_biases or unfit:
        if arch in ("llama", "qwen2"):
            arch = "deci"
        elif arch == "qwen3" and tied and not config.attention_bias:
            arch = "openelm"
        else:
            notes.append(
                "llama.cpp cannot load layers of different sizes of "
                f"{'Gemma 3' if arch == 'gemma3' else 'a Qwen3 with untied embeddings'}, so all are zero-padded to the widest; "
                "the file is as large and slow as if all were that wide"
            )
            sizes = [widest(sizes)] * len(sizes)
    if arch == "gemma3" and misread(config.model_type, config.layer_types) is not None:
        notes.append(
            "the full-attention layers of this model are not every sixth one; the file says which they are, but an "
            "older llama.cpp ignores that and computes something else: run `adapt-pruner verify` with the llama.cpp that you "
            "serve with"
        )
    window = getattr(config, "sliding_window", None)
    if arch != "gemma3" and window and window < config.max_position_embeddings and _slides(config):
        notes.append(f"llama.cpp has no sliding window for this model, so its context is set to the window of {window:,} tokens")
    return _Plan(arch, tuple(sizes), head_dim, experts), notes


def _of_experts(model: Any) -> tuple[list[LayerSizes], int]:
    """The sizes of layers with experts, whose neurons are those of one expert, and the number of experts.

    Raises:
        UsageError: layers differ.
    """
    layers = kinds_by_layer(model)
    if any(sizes != layers[0] for sizes in layers) or "experts" not in layers[0]:
        raise UsageError(
            "llama.cpp holds experts only in layers that are all alike, and those of this model differ; prune with "
            f"{settings({'equal_widths': True})}, or use the checkpoint as it is"
        )
    neurons = model.model.layers[0].mlp.experts.down_proj.shape[-1]
    return [LayerSizes(layers[0]["kv_heads"], layers[0]["query_heads"], neurons)] * len(layers), layers[0]["experts"]


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return types is None or "sliding_attention" in types


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its shape, its type and the bytes of its values."""

    shape: torch.Size
    kind: Any
    num_bytes: int


def _entries(gguf: Any, shapes: Mapping[str, Tensor], quant: str) -> tuple[dict[str, _Entry], bool]:
    """What is written of each tensor here, and whether llama.cpp has to make the final types of it.

    Source: `llama-quant.cpp` of llama.cpp, whose types of 4 and 5 bits have a head of 6 bits, or of 8 where its rows are no whole blocks.
    """
    kinds, entries, left = gguf.GGMLQuantizationType, {}, False
    head = next(name for name in _HEADS if name in shapes)
    for name, tensor in shapes.items():
        row, stored = tensor.shape[-1], _NAME.get(tensor.dtype, "f32")
        made = quant in _BLOCKS and (name != head or quant == "q8_0" or row % _K_BLOCK > 0)
        if tensor.dim() == 1 or _is_router(name):
            kind = "f32"
        elif quant in _NAME.values():
            kind = quant
        elif row % _BLOCK:
            kind = "f16"
        elif made:
            kind = "q8_0" if name == head else quant
        else:
            kind, left = stored, True
        numbers, size = gguf.GGML_QUANT_SIZES[kinds[kind.upper()]]
        entries[name] = _Entry(tensor.shape, kinds[kind.upper()], tensor.numel() // numbers * size)
    return entries, left


def _write(
    gguf: Any, loaded: Loaded, path: Path, plan: _Plan, quant: str, entries: Mapping[str, _Entry], read: Callable[[str], Tensor]
) -> list[str]:
    """Write the file with its keys and tensors, each of which is read, converted and written before the next."""
    writer = gguf.GGUFWriter(path, plan.arch)
    try:
        _add_keys(gguf, writer, loaded, plan, quant)
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        notes = add_tokenizer(writer, loaded.tokenizer, vocab_size=rows, ends=ends_of(loaded.model, loaded.tokenizer))
        for name, entry in entries.items():
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.num_bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for name, tensor in _tensors(loaded.model, plan, read):
            entry = entries[name]
            for part in tensor.detach().reshape(-1, tensor.shape[-1]).split(max(1, _AT_ONCE // tensor.shape[-1])):
                gguf.quants.quantize(part.float().contiguous().numpy(), entry.kind).tofile(file)
            writer.write_padding(file, entry.num_bytes)
    finally:
        writer.close()
    return notes


def _add_keys(gguf: Any, writer: Any, loaded: Loaded, plan: _Plan, quant: str) -> None:
    config, sizes = loaded.model.config, plan.sizes
    writer.add_type("model")
    base = origin(loaded.source)
    params = count_parameters(loaded.model)
    writer.add_name(f"{base['name']} pruned to {millions(params)}" if loaded.mask is not None else base["name"])
    for add, key in (
        (writer.add_license, "license"),
        (writer.add_license_name, "license_name"),
        (writer.add_license_link, "license_link"),
    ):
        if base.get(key):
            add(base[key])
    if loaded.mask is not None and base["hub"]:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base["name"])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base['hub']}")
    writer.add_description("pruned by adapt-pruner" if loaded.mask is not None else "written by adapt-pruner")
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if quant == "f32" else kinds[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None) if _slides(config) else None
    context = config.max_position_embeddings
    writer.add_context_length(min(context, window) if window and plan.arch != "gemma3" else context)
    writer.add_vocab_size(loaded.model.get_input_embeddings().weight.shape[0])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes))
    by_layer = plan.arch in ("deci", "openelm")
    for add, values in (
        (writer.add_head_count, [size.heads for size in sizes]),
        (writer.add_head_count_kv, [size.kv_heads for size in sizes]),
        (writer.add_feed_forward_length, [size.neurons for size in sizes]),
    ):
        add(values if by_layer else values[0])
    if plan.experts:
        writer.add_expert_count(plan.experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(sizes[0].neurons)
    writer.add_key_length(plan.head_dim)
    writer.add_value_length(plan.head_dim)
    writer.add_rope_dimension_count(plan.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = ropes_of(config.rope_parameters)[0]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if plan.arch == "gemma3":
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(ropes_of(config.rope_parameters)[1]["rope_theta"])


def _tensors(model: Any, plan: _Plan, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, under its name in llama.cpp; `read` gives the one of a name in the model."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = _NAMES | (_GEMMA_NAMES if plan.arch == "gemma3" else {})
    fused: dict[str, Tensor] = {}
    rope = ropes_of(model.config.rope_parameters)[0]
    if rope.get("rope_type") == "llama3":  # by which llama.cpp divides the frequencies of a plain rope
        plain = rope["rope_theta"] ** (-torch.arange(0, plan.head_dim, 2, dtype=torch.float64) / plan.head_dim)
        yield "rope_freqs.weight", (plain / type(model.model.rotary_emb)(model.config).inv_freq).float()
    widened = (lambda name, tensor: tensor) if plan.experts else widening(model, plan.sizes)
    for full in model.state_dict():
        module, _, leaf = full.rpartition(".")
        if full == "lm_head.weight" and tied:
            continue
        tensor = widened(full, read(full))
        if plan.arch == "gemma3" and module.endswith("norm"):
            tensor = tensor.float() + 1  # Gemma's norms scale by 1 + w
        if not module.startswith("model.layers."):
            yield f"{names[module]}.{leaf}", tensor
            continue
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        if inner == "mlp.experts":
            parts = zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True) if leaf == "gate_up_proj" else [("down", tensor)]
            yield from ((f"blk.{layer}.ffn_{name}_exps.weight", part) for name, part in parts)
            continue
        if plan.pairs_neighbours and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _neighbours(tensor, plan.head_dim)
        if plan.arch == "openelm" and inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            fused[inner[-6]] = tensor
            if len(fused) == 3:
                yield f"blk.{layer}.attn_qkv.weight", torch.cat([fused.pop(part) for part in "qkv"])
            continue
        yield f"blk.{layer}.{names[inner]}.{leaf}", tensor


def _neighbours(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder rows so that rows i and i + head_dim / 2 of every head, which are rotated together, become neighbours."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _is_router(name: str) -> bool:
    """Whether it is the weight of a router, which stays as exact as norms."""
    return name.endswith("ffn_gate_inp.weight")


def _left_wide(shapes: Mapping[str, Tensor], quant: str) -> list[str]:
    """A sentence on matrices that stay in 16 bits because their rows are not whole blocks; empty if there are none."""
    widths = [
        tensor.shape[-1]
        for name, tensor in shapes.items()
        if tensor.dim() > 1 and tensor.shape[-1] % _BLOCK and not _is_router(name)
    ]
    if not widths:
        return []
    return [
        f"{len(widths)} matrices stay in 16 bits, since their rows of {', '.join(map(str, sorted(set(widths))))} numbers are not whole "
        f"blocks of {_BLOCK}; they make the {quant} file larger"
    ]
