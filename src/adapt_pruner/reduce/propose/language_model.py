"""`proposals=language_model`: a chat model writes the next candidates of a search (Self-Pruner); they are checked and mended."""

import json
import queue
import random
import re
import threading
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import first_line
from adapt_pruner.reduce.propose.proposals import Candidate, Sizes, Space, evolution

_SHOWN = 8  # candidates in a prompt
_SECONDS = 120.0  # to wait for a whole answer
_TOKENS_A_RATE = 6  # that an answer may take, at most: digits, a comma, a space and some words
_LONGEST = 2**20  # characters of an answer that are read


@part("proposal")
def language_model(
    population: Sequence[Candidate],
    space: Space,
    draw: random.Random,
    number: int,
    *,
    model: Any = "",
    warn: Callable[[str], None] = lambda message: None,
) -> list[Sizes]:
    """A chat model reads the best candidates with their losses and writes new ones: rates in percent, one per axis.

    Rates become the nearest sizes of the space; then axes move by single levels until the budget is met. A list is dropped if it
    has the wrong length or holds anything but numbers from 0 to 100. `warn` is told how many lists were used, mended and dropped,
    or that the model did not answer. `evolution` makes the missing candidates, so the search goes on in any case.

    Args:
        model: the address of an OpenAI-compatible server with the name of its model, `http://localhost:8000/v1#NAME`; or a function
            that gives a model on this machine, as `checkpoint.load.load` returns it.

    Source: arXiv:2502.14413; its prompts are not public, these are ours.
    """
    used = mended = unusable = 0
    proposed: list[Sizes] = []
    try:
        most = max(1024, _TOKENS_A_RATE * number * len(space.base))
        text = _answer(model, _prompt(population, space, number), seed=draw.randrange(2**31), max_tokens=most)
        for rates in read_rates(text)[:number]:
            sizes = _sizes(rates, space)
            if sizes is None:
                unusable += 1
                continue
            whole = space.mended(sizes, draw)
            used, mended = used + (whole == sizes), mended + (whole != sizes)
            proposed.append(whole)
        told = (
            f"the language model wrote {used} candidates that were used as they are, {mended} that were corrected and "
            f"{unusable} unusable"
        )
    except Exception as error:  # from the network, from a server, or from a model whose context is too short
        told = f"the language model did not answer ({first_line(error)})"
    if len(proposed) < number:
        told += f"; evolution made {number - len(proposed)}"
    warn(told)
    return proposed + evolution(population, space, draw, number - len(proposed))


def read_rates(text: str) -> list[list[float | None]]:
    """The lists in square brackets in an answer, with None in place of whatever is not a number."""
    lists = []
    for match in re.finditer(r"\[([^\[\]]*)\]", text[:_LONGEST]):
        values: list[float | None] = []
        for word in filter(None, (word.strip() for word in match[1].split(","))):
            number = re.fullmatch(r"([+-]?\d{1,6}(?:\.\d{0,6})?)\s*%?", word)
            values.append(float(number[1]) if number else None)
        if values:
            lists.append(values)
    return lists


def _names(space: Space) -> list[str]:
    """The axes whose sizes the search changes, kind by kind."""
    return [name for names in space.kinds.values() if len(names) > 1 for name in names]


def _prompt(population: Sequence[Candidate], space: Space, number: int) -> str:
    """The prompt: the task, the best candidates with their losses, and the form of the answer."""
    names = _names(space)
    kinds = [
        f"{len(axes)} for the {kind.replace('_', ' ')} of each layer, first layer first"
        for kind, axes in space.kinds.items()
        if len(axes) > 1
    ]
    means = [
        f"{100 - 100 * sum(space.base[name] for name in axes) / sum(space.most[name] for name in axes):.0f} for {kind.replace('_', ' ')}"
        for kind, axes in space.kinds.items()
        if len(axes) > 1
    ]
    shown = "\n".join(
        f"loss {candidate.loss:.4f}: {[round(100 - 100 * candidate.sizes[name] / space.most[name]) for name in names]}"
        for candidate in population[:_SHOWN]
    )
    return (
        "A language model is being pruned. A candidate is a list of pruning rates in percent: "
        f"{', then '.join(kinds)}; {len(names)} numbers in all. The mean of the rates must be {' and '.join(means)}. "
        "A lower loss is better. These are the best candidates so far:\n"
        f"{shown}\n"
        f"Select the good ones and make {number} new candidates of them, by changing a few rates of one (mutation) or by taking rates "
        "from two (crossover). Answer with one list in square brackets a line and nothing else."
    )


def _sizes(rates: Sequence[float | None], space: Space) -> Sizes | None:
    """The sizes that rates stand for, each at its nearest level; None unless there is one rate from 0 to 100 for each axis."""
    names = _names(space)
    if len(rates) != len(names) or any(rate is None or not 0 <= rate <= 100 for rate in rates):
        return None
    sizes = dict(space.base)
    for name, rate in zip(names, rates, strict=True):
        wanted = space.most[name] * (1 - (rate or 0.0) / 100)
        sizes[name] = min(space.levels(name), key=lambda size: abs(size - wanted))
    return sizes


def _answer(model: Any, prompt: str, *, seed: int, max_tokens: int) -> str:
    """The model's answer, of at most so many tokens."""
    if isinstance(model, str):
        address, _, name = model.partition("#")
        body = {
            "model": name or "default", "messages": [{"role": "user", "content": prompt}], "temperature": 1.0, "max_tokens": max_tokens,
            "seed": seed,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{address.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return str(json.loads(_answered(request))["choices"][0]["message"]["content"])
    from adapt_pruner.evaluate.answer import answer

    here = model()
    return answer(here.model, here.tokenizer, prompt, max_new_tokens=max_tokens, temperature=1.0, seed=seed, dtype="auto").text


def _answered(request: urllib.request.Request) -> bytes:
    """What a server answers, all of it within `_SECONDS`; its own timeout begins anew with every byte."""
    results: queue.Queue[bytes | Exception] = queue.Queue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                results.put(response.read(4 * _LONGEST))
        except Exception as error:
            results.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        result = results.get(timeout=_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {_SECONDS:g} seconds") from None
    if isinstance(result, Exception):
        raise result
    return result
