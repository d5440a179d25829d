"""What happens in a run: events, how far it is, and the words for both."""

from adapt_pruner.core.events import base
from adapt_pruner.core.events.base import *  # noqa: F403

__all__ = [*base.__all__]
