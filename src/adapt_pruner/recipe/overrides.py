"""Keys of a recipe that a user sets one by one as `KEY=VALUE`, beside the options of a command."""

from collections.abc import Iterable, Sequence

from adapt_pruner.errors import UsageError, option, settings

__all__ = ["keys_of", "refuse_lost", "refuse_set_twice"]


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that overrides set."""
    return {written.partition("=")[0].strip() for written in overrides}


def refuse_set_twice(keys: Iterable[str], overrides: Sequence[str]) -> None:
    """Refuse overrides of keys that options have set already.

    Args:
        keys: dotted keys that options have set.
        overrides: further keys as `KEY=VALUE`.

    Raises:
        UsageError: such a key is set again.
    """
    if twice := sorted(keys_of(overrides) & set(keys)):
        raise UsageError(f"{', '.join(twice)} is set by its own option and by {option('settings')}; leave one of them out")


def refuse_lost(table: str, keys: Iterable[str]) -> None:
    """Refuse to set a whole table, such as `training={lr: 1e-4}`, where that would drop keys.

    Args:
        table: its dotted key.
        keys: dotted keys that are set besides.

    Raises:
        UsageError: some of them lie in the table.
    """
    if inside := sorted({key for key in keys if key.startswith(f"{table}.")}):
        raise UsageError(
            f"{settings({table: '…'})} would replace the whole table, and drop {', '.join(inside)}, which {'is' if len(inside) == 1 else 'are'} set "
            f"already; set single keys, such as {settings({inside[0]: 'VALUE'})}"
        )
