"""How likely a model finds continuations of contexts: the forward passes of lm-eval's tasks, which read shared beginnings once.

The choices of a question share a beginning: the question, a sentence up to its blank, or the examples before many questions. It
is read once, and its keys and values serve all choices. The head is applied only to the tokens of the choices.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.loss import capped, log_softmax_, logit_cap, through_head
from adapt_pruner.core.precision import precision, uses_bfloat16
from adapt_pruner.errors import RunError, UsageError

__all__ = ["Answer", "Pair", "harness_model", "loglikelihoods"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""
Answer = tuple[float, bool]
"""log p(continuation | context) in nats, and whether the model would write the continuation by itself."""

_CPU_TOKENS, _DEVICE_TOKENS = 256, 8192  # tokens after beginnings in one pass; on a CPU more would only add padding
_BEGINNINGS = 4  # a batch may have this many times as many tokens of beginnings; then sequences can be sorted better by length
_KEPT_TOKENS = 8192  # tokens whose keys and values one pass may hold, or 4 times the tokens of a pass if that is more
_LARGEST_GROUP = 64  # the most sequences that share a beginning
_WORTHWHILE = 10  # a beginning is shared if that saves at least one token in this many
_PLAIN_BATCH = 8  # sequences at a time if lm-eval's own code does the work


@dataclass
class _Read:
    """A sequence to be read once; all requests with the same ids share it.

    Attributes:
        ids: the tokens.
        first: the first position whose prediction is asked for.
        asked: (request, position of its first prediction, the tokens it asks about).
    """

    ids: tuple[int, ...]
    first: int
    asked: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)


@dataclass
class _Group:
    """Sequences that begin with the same `shared` tokens; for a single sequence, these are all its tokens."""

    reads: list[_Read]
    shared: int

    def following(self) -> int:
        """Tokens after the beginning, of all sequences."""
        return sum(len(read.ids) - self.shared for read in self.reads)


@torch.no_grad()
def loglikelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    on_answers: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """sum_t log p(c_t | context, c_<t) of each pair, and whether every c_t is the likeliest token.

    Contexts are padded on the left, so that a window of sliding attention reaches as far back as without padding. The tokens
    after them are padded on the right, where no scored token can see the padding. Neighbouring pairs share a beginning if that
    saves tokens.

    Args:
        model: causal LM in eval mode whose decoder takes `position_ids` and keeps keys and values; see `shares_beginnings`.
        pairs: contexts of at least one token. Pairs longer than `max_length` are cut off on the left, as in lm-eval.
        max_length: the most tokens that the model reads.
        batch_tokens: the most tokens after beginnings that are read at one time, unless one sequence is longer; by default what
            suits the device.
        on_answers: called with (done, of).

    Returns:
        One answer per pair, in the order of `pairs`.
    """
    device = next(model.parameters()).device
    limit = batch_tokens or (_CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS)
    answers: list[Answer] = [(0.0, True)] * len(pairs)
    done = 0
    for batch in _batches(_groups(_reads(pairs, max_length)), _BEGINNINGS * limit):
        for request, answer in _answered(model, batch, device, limit):
            answers[request] = answer
            done += 1
        if on_answers is not None:
            on_answers(done, len(pairs))
    return answers


def _reads(pairs: Sequence[Pair], max_length: int) -> list[_Read]:
    """The sequences to read: each sequence of ids once, for example one for all choices of a single token."""
    reads: dict[tuple[int, ...], _Read] = {}
    for request, (context, continuation) in enumerate(pairs):
        assert len(context) > 0, "a context has at least one token"
        assert len(continuation) <= max_length, "a continuation fits the model"
        ids = (*context, *continuation)[-(max_length + 1) :][:-1]
        first = len(ids) - len(continuation)
        read = reads.setdefault(ids, _Read(ids, first))
        read.first = min(read.first, first)
        read.asked.append((request, first, continuation))
    return list(reads.values())


def _groups(reads: Sequence[_Read]) -> list[_Group]:
    """Split a list of sequences into groups of neighbours with a common beginning so that the fewest tokens are read.

    `saved[j]` is the most that the first j sequences can save. If their last group is i … j - 1, it saves its shared tokens in
    all sequences but one.
    """
    lengths = [len(read.ids) for read in reads]
    common = [0, *(_common(a.ids, b.ids) for a, b in itertools.pairwise(reads))]
    saved, begins, shares = [0], [0], [0]
    for j in range(1, len(reads) + 1):
        best, begin, share = saved[j - 1], j - 1, lengths[j - 1]
        shared = total = lengths[j - 1]
        for i in range(j - 2, max(-1, j - 1 - _LARGEST_GROUP), -1):
            shared, total = min(shared, common[i + 1]), total + lengths[i]
            gain = (j - 1 - i) * shared
            if shared == 0:
                break
            if gain * _WORTHWHILE >= total and saved[i] + gain > best:
                best, begin, share = saved[i] + gain, i, shared
        saved.append(best)
        begins.append(begin)
        shares.append(share)
    groups = []
    j = len(reads)
    while j:
        groups.append(_Group(list(reads[begins[j] : j]), shares[j]))
        j = begins[j]
    return groups[::-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that two sequences share at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _batches(groups: Sequence[_Group], limit: int) -> Iterator[list[_Group]]:
    """Groups of similar length, with at most `limit` tokens of beginnings and `limit` after them; the longest come first."""
    batch: list[_Group] = []
    follow = 0
    for group in sorted(groups, key=lambda group: group.shared, reverse=True):
        own = group.following()
        if batch and (batch[0].shared * (len(batch) + 1) > limit or follow + own > limit):
            yield batch
            batch, follow = [], 0
        batch.append(group)
        follow += own
    if batch:
        yield batch


def _answered(model: Any, batch: Sequence[_Group], device: torch.device, limit: int) -> Iterator[tuple[int, Answer]]:
    """Read a batch and answer its requests."""
    decoder = model.get_decoder()
    picked: list[Tensor] = []  # hidden states whose predictions are asked for
    place: dict[tuple[int, int], int] = {}  # (group or read, position) -> its index in `picked`

    def pick(owner: object, row: Tensor, positions: range, offset: int) -> None:
        for position in positions:
            place[id(owner), position] = len(place)
        picked.append(row[positions.start + offset : positions.stop + offset])

    width = max(1, max(group.shared for group in batch))
    beginnings = [group.reads[0].ids[: group.shared] for group in batch]
    ids, seen = _padded(beginnings, width, device, left=True)
    several = any(len(group.reads) > 1 for group in batch)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    out = decoder(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=several)
    for row, group in zip(out.last_hidden_state, batch, strict=True):
        first = min(read.first for read in group.reads)
        if first < group.shared:
            pick(group, row, range(first, group.shared), width - group.shared)

    name = "cache" if "cache" in out else "past_key_values"  # transformers' present name, and its former one
    rest = [(index, read) for index, group in enumerate(batch) for read in group.reads if len(read.ids) > group.shared]
    rest.sort(key=lambda item: len(item[1].ids) - batch[item[0]].shared, reverse=True)
    while rest:
        index, read = rest[0]
        length = len(read.ids) - batch[index].shared
        count = max(1, min(limit // length, max(_KEPT_TOKENS, 4 * limit) // (width + length)))
        rows, rest = rest[:count], rest[count:]
        owners = torch.tensor([index for index, _ in rows], device=device)
        ids, own = _padded([read.ids[batch[index].shared :] for index, read in rows], length, device, left=False)
        began = seen[owners]
        hidden = decoder(
            input_ids=ids,
            attention_mask=torch.cat([began, own], 1),
            position_ids=began.sum(1, keepdim=True) + torch.arange(length, device=device),
            use_cache=True,
            **{name: _of_rows(out[name], owners)},
        ).last_hidden_state
        for row, (index, read) in zip(hidden, rows, strict=True):
            shared = batch[index].shared
            pick(read, row, range(max(read.first, shared), len(read.ids)), -shared)

    wanted: list[tuple[int, int]] = []  # (index of a hidden state, token), request after request
    spans = []
    for group in batch:
        for read in group.reads:
            for request, first, tokens in read.asked:
                at = range(first, first + len(tokens))
                wanted += [
                    (place[id(group if t < group.shared else read), t], token) for t, token in zip(at, tokens, strict=True)
                ]
                spans.append((request, len(tokens)))
    if wanted:
        values, likeliest = _predictions(model, torch.cat(picked), torch.tensor(wanted, device=device))
    start = 0
    for request, count in spans:
        own_values, own_likeliest = (values[start : start + count], likeliest[start : start + count]) if count else ([], [])
        yield request, (sum(own_values), all(own_likeliest))
        start += count


def _padded(rows: Sequence[Sequence[int]], width: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """int64 [rows, width] ids, and a mask that is 1 where ids are real."""
    ids, seen = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], seen[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), seen.to(device)


def _of_rows(cache: Any, rows: Tensor) -> Any:
    """The keys and values of the named rows of a batch; a row may be named several times. The cache itself is unchanged."""
    chosen = copy.copy(cache)
    chosen.layers = []
    for layer in cache.layers:
        own = copy.copy(layer)
        own.keys, own.values = layer.keys[rows], layer.values[rows]
        chosen.layers.append(own)
    return chosen


def _predictions(model: Any, hidden: Tensor, wanted: Tensor) -> tuple[list[float], list[bool]]:
    """log p of tokens, and whether they are the likeliest ones.

    Args:
        model: causal LM.
        hidden: [n, width], the inputs of its head.
        wanted: int64 [m, 2], index of a hidden state and a token.
    """
    order = wanted[:, 0].argsort(stable=True)
    which, tokens = wanted[order].unbind(1)
    which = which.contiguous()
    values = torch.empty(len(order), dtype=torch.float32, device=hidden.device)
    likeliest = torch.empty(len(order), dtype=torch.bool, device=hidden.device)

    def read(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        start, end = torch.searchsorted(which, torch.tensor([rows.start, rows.stop], device=which.device)).tolist()
        here, asked = which[start:end] - rows.start, tokens[start:end]
        likeliest[order[start:end]] = logits.argmax(-1)[here] == asked
        values[order[start:end]] = log_softmax_(logits)[here, asked]
        return logits.new_zeros(())

    through_head(hidden, model.get_output_embeddings(), capped(read, logit_cap(model)))
    return values.tolist(), likeliest.tolist()


@torch.no_grad()
def shares_beginnings(model: Any) -> bool:
    """Whether `loglikelihoods` gives the same as whole forward passes, tried on a few short sequences.

    The model's type is not asked: if its cache, positions or head work differently from what this file expects, the trial shows
    it.
    """
    device = next(model.parameters()).device
    ids = [7 * i * i % min(model.config.get_text_config().vocab_size, 997) for i in range(1, 15)]
    pairs: list[Pair] = [(ids[:9], ids[9:12]), (ids[:9], ids[10:14]), (ids[3:7], ids[8:9]), (ids[3:7], ids[5:8])]
    try:
        likelihoods = loglikelihoods(model, pairs, max_length=64, batch_tokens=64)
    except Exception:  # a model may fail in any way; then whole forward passes are used
        return False
    for (context, continuation), (value, _) in zip(pairs, likelihoods, strict=True):
        read = torch.tensor([[*context, *continuation[:-1]]], device=device)
        logits = model(input_ids=read, use_cache=False).logits[0, len(context) - 1 :].float().log_softmax(-1)
        plain = float(logits[range(len(continuation)), list(continuation)].sum())
        if not abs(value - plain) <= 1e-3 * max(1.0, abs(plain)):  # also true if a value is not a number
            return False
    return True


def harness_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    dtype: str = "float32",
    on_answers: Callable[[int, int], None] | None = None,
    on_cut: Callable[[int, int, int], None] | None = None,
) -> Any:
    """A model as lm-eval's `LM`: tokens, truncation and generation come from its `HFLM`, likelihoods from `loglikelihoods`.

    Like lm-eval, it begins texts as the tokenizer does by itself (Gemma's puts <bos> first, SmolLM2's nothing).
    `data.tokens.opening` uses the same rule for perplexity.

    Args:
        model: causal LM, in eval mode.
        tokenizer: a transformers tokenizer; left as found.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_answers: called with (done, of) while likelihoods are computed.
        on_cut: called with (requests, of, tokens) if `requests` requests are cut off on the left to the `tokens` that the model
            reads.

    Its likelihoods raise RunError if one is not a number, and UsageError if a continuation is longer than the model can read.
    """
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device
    fast = shares_beginnings(model)

    class Harness(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)  # we show progress ourselves

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
            pairs = [(context, continuation) for _, context, continuation in requests]
            if (longest := max((len(continuation) for _, continuation in pairs), default=0)) > self.max_length:
                raise UsageError(
                    f"a continuation of {longest:,} tokens is longer than the {self.max_length:,} that the model reads"
                )
            cut = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
            if cut and on_cut is not None:
                on_cut(cut, len(pairs), self.max_length)
            with precision(device, dtype):
                if fast:
                    answers = loglikelihoods(model, pairs, max_length=self.max_length, on_answers=on_answers)
                else:
                    answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            if any(math.isnan(value) for value, _ in answers):
                raise RunError("the likelihood of an answer is not a number; the model's weights are damaged or overflow")
            return answers

    return Harness(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval adds a padding token if it is missing
        batch_size=_PLAIN_BATCH,
        mixed_precision_dtype="bfloat16" if uses_bfloat16(device, dtype) else None,
        softmax_dtype="float32",
    )
