"""The model that a run distils from: loaded, checked against the run's model, and frozen."""

import copy
from dataclasses import replace
from typing import Any

import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.vocabulary import smaller_tokenizer
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.kinds import OF_THE_MODEL
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.precision import cast_weights, uses_bfloat16
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts
from adapt_pruner.work import Work

__all__ = ["teacher_of"]


def teacher_of(work: Work, *, begun: bool) -> Any:
    """The model to distil from, frozen, in the precision of matrix products; None if the objective needs none.

    If the run removed tokens from the vocabulary, the teacher loses the same tokens. Its distribution is then renormalised over
    those that stay.

    Raises:
        UsageError: the teacher has another vocabulary than the model.
    """
    loaded, recipe = work.loaded, work.recipe
    if recipe.training.source is None or not recipe.training.needs_teacher:
        return None
    device = next(loaded.model.parameters()).device
    name = recipe.training.teacher or recipe.model
    if recipe.training.teacher is None and not begun:
        teacher = copy.deepcopy(loaded.model)
    else:
        other = _with_same_tokens(load(name, device=device, trust_remote_code=work.trust_remote_code), work)
        if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UsageError(
                f"teacher {name} ({len(other.tokenizer):,} tokens) and {recipe.model} ({len(loaded.tokenizer):,}) have different "
                "tokenizers; distillation compares token by token, so name a teacher of the same vocabulary"
            )
        teacher = other.model
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, loaded.model)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher {name} has {sizes[0]:,} logits and {recipe.model} has {sizes[1]:,}; name a teacher of the same vocabulary"
        )
    if parts.bind("objective", recipe.training.objective).keywords.get("hidden"):
        _check_hidden(work, teacher)
    cast_weights(teacher, torch.bfloat16 if uses_bfloat16(device, recipe.dtype) else torch.float32)
    return teacher.eval().requires_grad_(False)


def _check_hidden(work: Work, teacher: Any) -> None:
    """Refuse to compare hidden states of models whose layers are not as many, or not as wide, once the student is pruned.

    Raises:
        UsageError: they are not.
    """
    recipe = work.recipe
    changed = [kind for kind in recipe.axes if kind in OF_THE_MODEL]
    if changed or work.reduction.changes_hidden_states:
        what = f"axes names {' and '.join(changed)}" if changed else f"reduce {recipe.reduce} changes their width or number"
        raise UsageError(
            f"objectives.distil(hidden=…) compares hidden states with those of the teacher, layer by layer, but {what}; leave out hidden"
        )
    ours, theirs = (
        (len(decoder_layers(model, families.axes(model))), model.get_input_embeddings().weight.shape[1])
        for model in (work.model, teacher)
    )
    if ours != theirs:
        raise UsageError(
            f"objectives.distil(hidden=…) compares hidden states layer by layer, but {recipe.model} has {ours[0]} layers of width {ours[1]} and "
            f"the teacher {theirs[0]} of {theirs[1]}; leave out hidden"
        )


def _with_same_tokens(teacher: Loaded, work: Work) -> Loaded:
    """A teacher without the tokens that the run removed, if it had the run's tokens before; any other teacher as it is."""
    keep = work.state.mask.kept.get("vocabulary")
    axes = families.axes(teacher.model)
    if keep is None or not any(axis.kind == "vocabulary" and axis.size == keep.numel() for axis in axes):
        return teacher
    smaller = smaller_tokenizer(teacher.tokenizer, keep)
    if smaller.get_vocab() != work.tokenizer.get_vocab():
        return teacher
    cut(teacher.model, axes, Mask({"vocabulary": keep}))
    return replace(teacher, tokenizer=smaller)
