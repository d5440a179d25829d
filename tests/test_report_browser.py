"""The report in a real browser, Debian's Chromium: nothing is asked of a network, nothing fails, everybody can read it."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.report import with_card
from adapt_pruner.report.comparison import comparison_page, comparison_pictures
from adapt_pruner.report.page import page, write_page
from adapt_pruner.report.paper import picture
from adapt_pruner.report.record import read_record
from test_report import small_recipe
from test_report_comparison import comparison_result, many_methods

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed (pip install playwright)"
    ),
]

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    with_card.run(small_recipe(tiny_folder, text_file), folder / "run")
    _add_tasks(folder / "run")
    result = comparison_result()
    compared = comparison_page(result, ["method", "parameters"], [["dense", "100"], ["good", "80"]], name="cmp")
    (folder / "compare.svg").write_text(picture(comparison_pictures(many_methods())[0]), encoding="utf-8")
    return {
        "run": folder / "run" / "report.html", "comparison": write_page(folder / "compare.html", compared), "file": folder / "compare.svg",
    }  # fmt: skip


def _add_tasks(run_dir: Path) -> None:
    """Let the run have scored tasks, which takes lm-eval."""

    def scored(stage: int, values: tuple[float, float]) -> str:
        tasks = [
            {"task": name, "metric": "acc", "value": value, "stderr": 0.02, "chance": 0.25, "accuracy": True, "items": 9, "shots": 0}
            for name, value in zip(("arc_challenge", "piqa"), values, strict=True)
        ]  # fmt: skip
        return json.dumps(
            {"event": "tasks", "stage": stage, "params": 1, "average": sum(values) / 2, "stderr": 0.01, "scores": tasks}
        )

    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(scored(0, (0.5, 0.9)) + "\n" + scored(2, (0.25, 0.7)) + "\n")
    write_page(run_dir / "report.html", page(read_record(run_dir)))


class Opened:
    """A page in the browser, and what it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, *, width: int, scheme: str, script: bool = True) -> None:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, java_script_enabled=script)
        self.page = context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("which", ["run", "comparison"])
def test_the_page_opens_by_itself_and_fits(browser: Any, pages: dict[str, Path], which: str, width: int, scheme: str) -> None:
    opened = Opened(browser, pages[which], width=width, scheme=scheme)
    assert opened.asked == [pages[which].as_uri()], "nothing but the page itself"
    assert opened.complaints == []
    wide = opened.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"scrolls sideways to {wide}"
    figures = opened.page.eval_on_selector_all(
        "figure svg",
        "found => found.map(one => [one.getBoundingClientRect().width, one.getBoundingClientRect().height, one.children.length])",
    )
    assert len(figures) >= (11 if which == "run" else 2)
    assert all(across > width / 6 and high > 20 and marks for across, high, marks in figures), figures
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(channels) > 600) == (scheme == "light"), paper


@pytest.mark.skipif(
    importlib.util.find_spec("axe_playwright_python") is None, reason="axe is not installed (pip install axe-playwright-python)"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["run", "comparison"])
def test_everybody_can_read_it(browser: Any, pages: dict[str, Path], which: str, scheme: str) -> None:
    """axe finds nothing, with the tables of figures opened too."""
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, pages[which], width=DESKTOP, scheme=scheme)
    opened.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    found = Axe().run(opened.page)
    assert found.violations_count == 0, found.generate_report()


def test_figures_show_under_the_pointer(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"], width=DESKTOP, scheme="light")
    for place, words in (
        ("#anatomy .tall rect, #anatomy .low rect", "layer 0"),
        ("#importance rect", "layer 0, 1.1"),
        ("#loss .canvas", "training tokens"),
        ("#tasks rect.kept", "arc_challenge, now: 25.0 ± 2.0 %"),
    ):
        opened.page.locator(place).first.scroll_into_view_if_needed()
        opened.page.wait_for_timeout(300)  # a scroll that still goes on takes the words away again
        opened.page.locator(place).first.hover()
        tip = opened.page.locator("#tip")
        tip.wait_for(state="visible", timeout=5000)
        assert words in tip.inner_text()
    opened.page.mouse.move(2, 2)
    assert opened.page.locator("#tip").is_hidden()


def test_the_slider_shows_the_model_after_each_stage(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"], width=PHONE, scheme="light")
    count = "document.querySelectorAll('#anatomy svg .gone:not(.still)').length"
    slider = opened.page.locator("#stage")
    assert slider.is_visible()
    all_gone = opened.page.evaluate(count)
    slider.fill("0")
    assert opened.page.evaluate(count) == 0, "the dense model has lost nothing"
    assert "dense" in opened.page.locator("output").inner_text()
    slider.fill("1")
    assert 0 < opened.page.evaluate(count) < all_gone


def test_without_script_and_on_paper_all_is_there(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"], width=DESKTOP, scheme="dark", script=False)
    assert opened.page.locator("#anatomy rect title").count() > 0
    assert opened.page.locator(".slider").is_hidden(), "what would do nothing is not shown"
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#loss svg").is_visible()
    assert opened.page.locator("nav").is_hidden()
    assert opened.page.pdf(format="A4").startswith(b"%PDF")


def test_names_in_a_picture_for_papers_are_apart_and_inside(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["file"], width=DESKTOP, scheme="light")
    assert (opened.asked, opened.complaints) == ([pages["file"].as_uri()], [])
    boxes = opened.page.eval_on_selector_all(
        "text[font-weight]",
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])",
    )
    assert len(boxes) == 9, "all methods but the ruin"
    middle = [(left, (top + bottom) / 2, right) for left, top, right, bottom in boxes]
    for (left, at, right), (begin, other, end) in combinations(middle, 2):
        assert left >= end or begin >= right or abs(at - other) > 11, "letters are about as high"
    frame = opened.page.locator("svg svg").bounding_box()
    assert all(left >= frame["x"] and right <= frame["x"] + frame["width"] for left, _, right in middle)
