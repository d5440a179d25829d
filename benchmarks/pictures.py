"""Two pictures: a terminal, for the tutorial, and the page of a run.

    python benchmarks/pictures.py terminal COMMAND …        # runs it and draws docs/terminal.svg
    python benchmarks/pictures.py page RUN_DIR              # docs/report.png, of its report.html; needs playwright and chromium

The terminal shows the command, what it said on the way as lines (no bar), and its results. It runs in an empty folder.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

DOCS = Path(__file__).parents[1] / "docs"
_WIDTH = 100
_SIZE = {"width": 1280, "height": 1040}  # pixels of the page, from its top


def terminal(words: list[str], *, out: Path) -> None:
    """Run a command and draw what it printed, its results as on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, _WIDTH, 0, 0))
    environment = os.environ | {"COLUMNS": str(_WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "adapt_pruner", *words]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder)
    os.close(theirs)
    printed = _all_of(ours)
    os.close(ours)
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text(f"$ adapt-pruner {shlex.join(words)}", style="bold green"))
    told = [line for line in done.stderr.splitlines() if not re.match(r"stage 1, .*(ing \d)|\w+ing \d|reading|writing", line)]
    console.print(Text("\n".join(told), style="dim"))
    console.print(Text.from_ansi(printed.decode().replace("\r\n", "\n")))
    drawn = console.export_svg(title="adapt-pruner", theme=DIMMED_MONOKAI)
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")  # which ask a network


def _all_of(terminal: int) -> bytes:
    """What was written to a terminal whose other end is closed."""
    found = b""
    with suppress(OSError):  # which is how Linux says that there is no more
        while some := os.read(terminal, 1 << 16):
            found += some
    return found


def page(run: Path, *, out: Path) -> None:
    """The top of a run's page, as a browser shows it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        shown = browser.new_page(viewport=_SIZE)  # type: ignore[arg-type]
        shown.goto((run / "report.html").resolve().as_uri())
        shown.screenshot(path=str(out))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["terminal", "page"])
    asked, words = parser.parse_known_args()
    if asked.which == "terminal":
        terminal(words, out=DOCS / "terminal.svg")
    else:
        page(Path(words[0]), out=DOCS / "report.png")


if __name__ == "__main__":
    main()
