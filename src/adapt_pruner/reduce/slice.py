"""`reduce: slice`, SliceGPT: rotate the residual stream to its principal directions and cut off the last of them.

With n(x) = x / √(mean(x²) + eps), an RMSNorm is diag(scale) n(x), and n(x Q) = n(x) Q for every orthogonal Q. So the scale can
move into the linear layers that read the norm (`fold_scale`). A layer that reads the stream takes W Q (`rotate_input`), one that
writes to it takes Qᵀ W (`rotate_output`). The shortcut past a block goes from the basis before it, Q, to the basis after it, Q',
by Qᵀ Q'. With all d columns of Q nothing changes; with the first k columns the stream is k wide.

Shapes: linear weights [out, in] as torch has them, bases float64 [d, k] with orthonormal columns, signals [batch, length, d].
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model import modeling_sliced
from adapt_pruner.core.model.layers import decoder_layers, streams
from adapt_pruner.core.model.precision import casting_once, precision
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.work import Change, Reduction, TextUse, Work

_MULTIPLE = 8  # widths are multiples of this

_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the stream, through a norm
_WRITERS = ("o_proj", "down_proj")


@part("reduce", needs={"one stage", "text"})
class SliceGPT(Reduction):
    """Rotate the residual stream to its principal directions and cut off the last of them; adds shortcut matrices (SliceGPT)."""

    fills_zeros = True
    changes_hidden_states = True

    def check(self, work: Work) -> None:
        """Refuse liger, which has no kernel for the norms of a sliced model."""
        if work.recipe.training.liger and work.recipe.training.source is not None:
            raise UsageError("training.liger has no kernel for the norms of a sliced model; set training.liger=false")

    def floor(self, work: Work) -> tuple[int, str]:
        """The parameters that are left with the narrowest stream; a model that cannot be sliced is refused."""
        _check_model(work.model)
        least, dense = sliced_parameters(work.model, _MULTIPLE), work.model.get_output_embeddings().weight.shape[1]
        return least, f"{_MULTIPLE} of {dense} dimensions are left, whole head and shortcuts counted"

    def text_use(self, work: Work) -> TextUse:
        """The calibration text, once."""
        return TextUse(text=True)

    def steps(self, work: Work, target: int) -> Iterator[Change]:
        """Slice the stream, in one step, to the widest at which the model has at most `target` parameters."""
        if work.num_params <= target:
            return
        width = width_for(work.model, target)
        batches = work.batches()
        num_tokens = sum(batch.numel() for batch in batches)
        if num_tokens < width:
            work.warn(
                f"the calibration text has {num_tokens:,} tokens, fewer than the {width:,} directions to keep; set "
                "calibration.samples higher"
            )
        with work.state.clock("score"):
            tell = work.progress("score", stage=work.state.stage, iteration=work.iteration)
            slice_to(work.model, width, batches, dtype=work.recipe.dtype, on_basis=tell)
        yield Change(None, told={"sizes": {"width": width}, "distances": None})


def width_for(model: Any, keep: int) -> int:
    """The widest stream, a multiple of 8, with at most `keep` parameters in the sliced model; `keep` is `SliceGPT.floor` or more."""
    dense = model.get_output_embeddings().weight.shape[1]
    return max(width for width in range(_MULTIPLE, dense, _MULTIPLE) if sliced_parameters(model, width) <= keep)


def _check_model(model: Any) -> None:
    """Refuse a model that cannot be sliced.

    Raises:
        UsageError: there is no sliced class for this kind of model, or a layer lacks its attention or MLP.
    """
    _sliced_class(model)
    if lacking := [i for i, layer in enumerate(model.config.per_layer_config) if getattr(layer, "skip", ())]:
        raise UsageError(
            f"layer {lacking[0]} has no attention or no MLP, and slicing changes the basis at both; set reduce to units, or "
            "slice the model that it came from"
        )


def slice_to(
    model: Any, width: int, batches: Sequence[Tensor], *, dtype: str, on_basis: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Turn `model`, in place, into the sliced model of that width: the same object with another class, config and parameters.

    Args:
        model: causal LM of the Llama layout, in eval mode; its layers may differ in heads and neurons.
        width: dimensions of the residual stream that stay.
        batches: calibration text, int64 [batch, length].
        dtype: precision of matrix products while signals are collected.
        on_basis: told (done, of) after each basis, two per layer.

    Raises:
        RunError: a signal is not finite; the model is unchanged.
    """
    config = copy.deepcopy(model.config)
    config.sliced_hidden_size = width
    config.tie_word_embeddings = False
    config.head_dim = decoder_layers(model)[0].self_attn.head_dim  # stock code would derive it from the width
    weight = model.get_output_embeddings().weight
    sliced = _sliced_class(model)(config).to(weight.device, weight.dtype)
    rotate(model, sliced, directions(model, batches, width, dtype=dtype, on_basis=on_basis))
    sliced.generation_config = model.generation_config
    sliced.train(model.training)
    model.__class__, model.__dict__ = sliced.__class__, sliced.__dict__


def _sliced_class(model: Any) -> Any:
    stock = type(model).__name__.removeprefix("Pruned")
    sliced = getattr(modeling_sliced, f"Sliced{stock}", None)
    if sliced is None:
        sliceable = ", ".join(f"{name}ForCausalLM" for name in modeling_sliced.STOCK)
        raise UsageError(f"{stock} cannot be sliced, since there is no sliced class for it; known: {sliceable}")
    return sliced


def principal_directions(moment: Tensor, width: int) -> Tensor:
    """The `width` orthonormal directions that hold most of the signal: eigenvectors of XᵀX by descending eigenvalue.

    Args:
        moment: XᵀX, float64 [d, d].
        width: k, at most d.

    Returns:
        float64 [d, k].

    Raises:
        RunError: the signal was not finite.

    Source: SliceGPT, arXiv:2401.15024, section 3.3. The authors' code adds 1 % of the mean of the diagonal to the diagonal
    first; that shifts all eigenvalues equally and changes no eigenvector, so it is left out here.
    """
    if not bool(torch.isfinite(moment).all()):
        raise RunError(
            "the hidden states on the calibration text are not finite; the model's weights are damaged: get the files again"
        )
    _, vectors = torch.linalg.eigh(moment)  # ascending
    largest: Tensor = vectors.flip(1)[:, :width]
    return largest.contiguous()


def fold_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """W diag(scale), float64: moves the scale of a norm into the layer after it."""
    return weight.double() * scale.double()


def rotate_input(weight: Tensor, basis: Tensor) -> Tensor:
    """W Q, float64 [out, k]: makes a weight that reads the stream read it in the basis Q."""
    return weight.double() @ basis


def rotate_output(weight: Tensor, basis: Tensor) -> Tensor:
    """Qᵀ W, float64 [k, …]: makes a weight or bias that writes to the stream write in the basis Q."""
    return basis.T @ weight.double()


@torch.no_grad()
def directions(
    model: Any,
    batches: Sequence[Tensor],
    width: int,
    *,
    dtype: str,
    on_basis: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Tensor]:
    """The basis of the stream before each block in turn: attention of layer 0, its MLP, attention of layer 1, …

    A signal is the input of a block after its norm, without the norm's scale. Signals of later blocks lack the directions that
    earlier bases leave out: the dense blocks read and pass on x Q Qᵀ, as the sliced blocks will.

    Args:
        model: causal LM of the Llama layout, in eval mode; left as found.
        batches: token ids, int64 [batch, length]; several processes share the batches.
        width: k.
        dtype: precision of the blocks' matrix products: `auto`, `float32` or `bfloat16`. Moments are float64.
        on_basis: told (done, of) after each.

    Yields:
        float64 [d, k], two per layer, on the model's device.

    Raises:
        RunError: a signal is not finite.

    Source: SliceGPT, arXiv:2401.15024, section 3.3. Differs: the authors' code takes the signal before its norm. Its option
    `final_orientation` adds a random rotation within the k directions; that cancels out and is left out here.
    """
    layers = decoder_layers(model)
    flow = streams(model, world.share(batches), dtype=dtype)
    blocks = [
        (index, norm, block)
        for index, layer in enumerate(layers)
        for norm, block in (
            (layer.input_layernorm, layer.self_attn),
            (layer.post_attention_layernorm, layer.mlp),
        )
    ]
    for done, (index, norm, block) in enumerate(blocks, start=1):
        basis = principal_directions(_moment([stream.hidden for stream in flow], norm), width)
        yield basis
        narrow = basis.to(norm.weight.dtype)
        with casting_once(layers[index]):
            for stream in flow:
                kept = stream.hidden @ narrow @ narrow.T
                with precision(kept.device, dtype):
                    if block is layers[index].mlp:
                        stream.hidden = kept + block(norm(kept))
                    else:
                        stream.hidden = kept + block(hidden_states=norm(kept), **stream.keywords[index])[0]
        on_basis(done, len(blocks))


def _moment(signals: Sequence[Tensor], norm: Any) -> Tensor:
    """XᵀX of the normed signals without scale, over all processes, float64 [d, d]."""
    width = norm.weight.shape[0]
    total = torch.zeros(width, width, dtype=torch.float64, device=norm.weight.device)
    for signal in signals:
        wide = signal.double().flatten(0, -2)
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        total += unit.T @ unit
    world.sum_in_place(total)
    return total


@torch.no_grad()
def rotate(model: Any, sliced: Any, bases: Iterable[Tensor]) -> None:
    """Copy the weights of `model`, rotated to the given bases, into `sliced`, in place; they are cast once at the end.

    The head is not sliced: the stream leaves the last layer in the dense basis, d wide.

    Args:
        model: causal LM of the Llama layout; left as found.
        sliced: the model of `core.model.modeling_sliced` that is as wide as the bases.
        bases: the basis before each block, float64 [d, k] with orthonormal columns, as `directions` yields them.

    Source: SliceGPT, arXiv:2401.15024, algorithm 1. Differs: the authors' code rotates the unsliced head and the output of the
    last layer by one more Q, which cancels out.
    """
    turning = iter(bases)
    entering = next(turning)
    sliced.get_input_embeddings().weight.copy_(rotate_input(model.get_input_embeddings().weight, entering))
    for dense, layer in zip(decoder_layers(model), decoder_layers(sliced), strict=True):
        between = next(turning)
        _rotate_block(dense.self_attn, layer.self_attn, dense.input_layernorm.weight, entering, between)
        layer.attention_shortcut.weight.copy_(between.T @ entering)
        leaving = next(turning, None)
        if leaving is None:
            leaving = torch.eye(entering.shape[0], dtype=entering.dtype, device=entering.device)
        _rotate_block(dense.mlp, layer.mlp, dense.post_attention_layernorm.weight, between, leaving)
        layer.mlp_shortcut.weight.copy_(leaving.T @ between)
        entering = leaving
    sliced.get_output_embeddings().weight.copy_(fold_scale(model.get_output_embeddings().weight, model.get_decoder().norm.weight))


def _rotate_block(dense: nn.Module, block: nn.Module, scale: Tensor, entering: Tensor, leaving: Tensor) -> None:
    """Copy the rotated weights of the dense block into a block, in place; weights that do not touch the stream stay the same."""
    for name, value in dense.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module in _WRITERS:
            turned = rotate_output(value, leaving)
        elif module in _READERS and leaf == "weight":
            turned = rotate_input(fold_scale(value, scale), entering)
        else:
            turned = value
        block.get_parameter(name).copy_(turned)


def sliced_parameters(model: Any, width: int) -> int:
    """Parameters of `model` once sliced to `width`, with shortcuts and untied embeddings; the norms then have no scale.

    With L layers, width d before and k after, V tokens, R the rows that read or write the stream (one d or k long each):

        V k + V d + L · 2 k² + k R   and for the last layer, which writes d wide,   (d - k) (k + neurons)
    """
    head = model.get_output_embeddings().weight
    dense = head.shape[1]
    layers = decoder_layers(model)
    last_writer = layers[-1].mlp.down_proj
    total = head.numel() + model.get_input_embeddings().weight.shape[0] * width
    total += 2 * len(layers) * width**2 + (dense - width) * (width + last_writer.in_features + (last_writer.bias is not None))
    for layer in layers:
        for name, parameter in layer.named_parameters():
            module, leaf = name.split(".")[-2:]
            on_stream = leaf == "weight" or module in _WRITERS
            if module in (*_READERS, *_WRITERS) and on_stream:
                total += parameter.numel() // dense * width
            elif module not in ("input_layernorm", "post_attention_layernorm"):
                total += parameter.numel()
    return int(total)
