"""Floor 6: the command line; thin: parse, call, print. Results go to stdout, everything else to stderr."""

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from adapt_pruner.cli.evaluate import evaluate
from adapt_pruner.cli.inspect import inspect
from adapt_pruner.cli.methods import methods
from adapt_pruner.cli.prune import prune
from adapt_pruner.cli.run import run
from adapt_pruner.errors import RunError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="Make small language models out of larger ones: adaptive structured pruning, interleaved with training.\n\n"
    "Try `adapt-pruner prune smollm2-135m-instruct -o small --params 110M`, or `adapt-pruner COMMAND --help`.",
)
for command, name in ((prune, "prune"), (run, "run"), (evaluate, "eval"), (inspect, "inspect"), (methods, "methods")):
    app.command(name)(command)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"adapt-pruner {version('adapt-pruner')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every error becomes one sentence and an exit status: 2 for usage, 1 for failure."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported; progress is ours to show
    try:
        app()
    except UsageError as error:
        _stop(str(error), 2)
    except RunError as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; nothing half-written was left under its final name", 1)
    except OSError as error:
        full = "the disk is full; free some space and run again" if error.errno == errno.ENOSPC else str(error)
        _stop(full, 1, error)
    except MemoryError as error:
        _stop("out of memory; use fewer calibration or batch tokens, or a machine with more memory", 1, error)
    except Exception as error:  # the last resort: a fault of ours still ends in a sentence
        if type(error).__name__ == "OutOfMemoryError":
            _stop("out of GPU memory; use fewer calibration or batch tokens, or --device cpu", 1, error)
        first = str(error).strip().partition("\n")[0]
        _stop(f"unexpected {type(error).__name__}: {first} (ADAPT_PRUNER_TRACEBACK=1 shows where)", 1, error)


def _stop(sentence: str, status: int, error: BaseException | None = None) -> None:
    if error is not None and os.environ.get("ADAPT_PRUNER_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(status)
