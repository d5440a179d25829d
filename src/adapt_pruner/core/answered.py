"""The event of a model's answers to the run's prompts."""

from typing import Literal

from typing_extensions import TypedDict

from adapt_pruner.core.events import Count, Event

__all__ = ["Answered", "Said"]


class Said(TypedDict):
    """A prompt and what the model answered, without special tokens."""

    prompt: str
    text: str


class Answered(Event):
    """The model answered the run's prompts: stage 0 is the model at the start.

    Attributes:
        stage: counted from 1.
        answers: in the order of the prompts.
    """

    event: Literal["answered"] = "answered"
    stage: Count
    answers: list[Said]
