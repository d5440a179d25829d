"""Let a model continue many sequences at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adapt_pruner.core.model.precision import casting_once, precision, refuse_nonfinite

_LONGER, _APART = (
    2.0,
    64,
)  # a sequence this many times as long as the shortest of a batch, and so many tokens more, begins another


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a model ends its turn."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [end for end in (ends,) if end is not None]


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
                ids, attended = _padded([sequences[number] for number in numbers], device)
                written = model.generate(
                    ids, attention_mask=attended, max_new_tokens=most, logits_processor=checks,
                    stopping_criteria=StoppingCriteriaList([_Ended(ends, ids.shape[1])]), **draws,
                )[:, ids.shape[1] :].tolist()  # fmt: skip
                replies |= {number: _until(new, ends) for number, new in zip(numbers, written, strict=True)}
            return [replies[number] for number in range(len(sequences))]
        finally:
            model.generation_config = own_config
            model.train(training)


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Stops once every sequence has come to an end; those that have ended go on until then, and are cut afterwards."""

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


def _until(written: list[int], ends: Sequence[Sequence[int]]) -> list[int]:
    """What was written up to and with the first end."""
    for stop in range(1, len(written) + 1):
        if any(written[max(0, stop - len(end)) : stop] == list(end) for end in ends):
            return written[:stop]
    return written


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
