"""The two pictures of the README: a terminal and the page of a run.

    python benchmarks/pictures.py terminal COMMAND …        # runs it and draws docs/terminal.svg
    python benchmarks/pictures.py page RUN_DIR              # docs/report.png, of its report.html; needs playwright and chromium

The terminal shows what the command printed where nothing is a terminal, so no bar and no colour.
"""

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

DOCS = Path(__file__).parents[1] / "docs"
_WIDTH = 100
_SIZE = {"width": 1280, "height": 1040}  # pixels of the page, from its top


def terminal(words: list[str], *, out: Path) -> None:
    """Run a command and draw what it printed."""
    done = subprocess.run([sys.executable, "-m", "adapt_pruner", *words], capture_output=True, text=True, check=True)
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text(f"$ adapt-pruner {shlex.join(words)}", style="bold green"))
    lines = [line for line in done.stderr.splitlines() if not re.match(r"stage 1: \w+ing|reading|writing", line)]
    console.print(Text("\n".join([*lines, *done.stdout.splitlines()])))
    drawn = console.export_svg(title="adapt-pruner", theme=DIMMED_MONOKAI)
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")  # which ask a network


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
