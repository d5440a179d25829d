"""Let a model continue many sequences at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adapt_pruner.core.model.precision import casting_once, precision, refuse_nonfinite

_LONGER, _APART = 2.0, 64
"""A sequence this many times as long as the shortest of a batch, and so many tokens more, begins another batch."""
_AT_ONCE = 16
"""Tokens after which the sequences that have ended leave the batch."""
_CACHES = {"cache", "past_key_values"}  # how `generate` names its cache, by its version


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a model ends its turn."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


@torch.no_grad()
def continued(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Sequence[Sequence[int]],
    temperature: float,
    seed: int,
    dtype: str = "float32",
) -> list[list[int]]:
    """What a model writes after each sequence, up to and with the first of `ends`, or `most` tokens if it comes to no end.

    Sequences of about equal length are written together. The model's random state and settings are left as found.

    Args:
        model: causal LM.
        sequences: token ids, at least one of each.
        most: the most tokens of each continuation.
        ends: token ids that end one.
        temperature: of the draws; 0 takes the likeliest token each time.
        seed: of the draws.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.

    Raises:
        RunError: a logit is infinite or not a number.
    """
    device = next(model.parameters()).device
    training, own_config = model.training, model.generation_config
    replies: dict[int, list[int]] = {}
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        casting_once(model),
        precision(device, dtype),
    ):
        try:
            model.eval()
            model.generation_config = GenerationConfig(pad_token_id=0)  # the model's own penalties would change what it writes
            torch.manual_seed(seed)
            checks = LogitsProcessorList([refuse_nonfinite("nothing can be written from logits of nan or inf", device, dtype)])
            draws = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
            )
            for numbers in _batches(sequences):
                written = _written(model, [sequences[number] for number in numbers], most, ends, logits_processor=checks, **draws)
                replies |= dict(zip(numbers, written, strict=True))
            return [replies[number] for number in range(len(sequences))]
        finally:
            model.generation_config = own_config
            model.train(training)


def _written(
    model: Any, sequences: Sequence[Sequence[int]], most: int, ends: Sequence[Sequence[int]], **how: Any
) -> list[list[int]]:
    """What the model writes after each sequence of a batch; those that have ended leave it every `_AT_ONCE` tokens."""
    ids, attended = _padded(sequences, next(model.parameters()).device)
    start, rows = ids.shape[1], list(range(len(sequences)))
    caches: dict[str, Any] = {}
    written: list[list[int]] = [[] for _ in sequences]
    while rows and (left := most - (ids.shape[1] - start)):
        out = model.generate(
            ids, attention_mask=attended, max_new_tokens=min(left, _AT_ONCE), return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([_Ended(ends, start)]), **caches, **how,
        )  # fmt: skip
        for row, new in zip(rows, out.sequences[:, start:].tolist(), strict=True):
            written[row] = new
        places = [place for place, row in enumerate(rows) if _stop(written[row], ends) is None]
        going = torch.tensor(places, dtype=torch.int64, device=ids.device)
        ids = out.sequences[going]
        attended = torch.cat([attended[going], attended.new_ones(len(places), ids.shape[1] - attended.shape[1])], dim=1)
        caches = {name: out[name] for name in _CACHES & out.keys()}
        if len(places) < len(rows):
            caches = {name: part for name, cache in caches.items() if (part := _of_rows(cache, going)) is not None}
        rows = [rows[place] for place in places]
    return [new[: _stop(new, ends)] for new in written]


def _of_rows(cache: Any, rows: Tensor) -> Any:
    """The cache of some rows of a batch; None, so that it is computed again, if a layer's cache cannot be divided."""
    if not all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None])):
        return None
    cache.batch_select_indices(rows)
    return cache


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Stops once every sequence has come to an end."""

    def __init__(self, ends: Sequence[Sequence[int]], start: int) -> None:
        self._ends, self._start = ends, start
        self._done = torch.tensor(False)

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        new = input_ids[:, self._start :]
        self._done = self._done.to(new.device).expand(len(new))
        for end in self._ends:
            if new.shape[1] >= len(end):
                self._done = self._done | (new[:, -len(end) :] == torch.tensor(end, device=new.device)).all(1)
        return self._done.all().expand(len(new))


def _stop(written: list[int], ends: Sequence[Sequence[int]]) -> int | None:
    """The number of tokens up to and with the first end; None if there is no end."""
    stops = range(1, len(written) + 1)
    return next((stop for stop in stops if any(written[max(0, stop - len(end)) : stop] == list(end) for end in ends)), None)


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of the sequences in groups of about equal length."""
    batch: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: len(sequences[number])):
        if batch and len(sequences[number]) > _LONGER * len(sequences[batch[0]]) + _APART:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequences as one batch, padded on the left, and which of its tokens are theirs."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        attended[row, width - len(sequence) :] = 1
    return ids.to(device), attended.to(device)
