"""The page in a real browser: everything is drawn, nothing is asked of a server, nothing sticks out on a phone."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gisp_tasks.report import Places, render

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `make setup`")

PERPLEXITY = "wikitext2_ppl_token_w128"
SOLUTIONS = "gsm8k_solution_ppl_token"
METRICS = tuple(
    {PERPLEXITY: value, SOLUTIONS: value / 5, "gsm8k_exact_match_strict": 3 / value, "commonsense_qa_acc": 8 / value}
    for value in (20.0, 31.0, 90.0)
)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser found ({', '.join(names)}); on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Containers of a CI have no user namespaces for its sandbox; it opens nothing but our own file.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page that is open, what its console said, and what it asked for besides itself."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_load_state("networkidle")

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Any]) -> Path:
    run = finished_run(layers=30, channels=1536, metrics=METRICS)
    run.summary["store"] += "/a-long-name-without-any-place-to-break-it" * 3
    path = tmp_path_factory.mktemp("page") / "report.html"
    places = Places(tracking_uri="https://mlflow.example", experiment_id="1", mlflow_run="2")
    path.write_text(render(run.summary, manifest=run.manifest, trajectory=run.trajectory, places=places))
    return path


@pytest.fixture(params=[(size, theme) for size in WIDTHS for theme in ("light", "dark")], ids="-".join)
def opened(browser: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    size, theme = request.param
    width, height = WIDTHS[size]
    page = Opened(browser, file, viewport={"width": width, "height": height}, color_scheme=theme)
    yield page
    page.close()


def test_quiet_complete_and_within_the_screen(opened: Opened, file: Path) -> None:
    page = opened.page
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [file.as_uri()]
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("figure svg").all()
    assert len(pictures) == 9
    for picture in pictures:
        box = picture.bounding_box()
        assert box["width"] > 0.7 * min(width, 400)
        assert box["height"] > 100
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        drawn = picture.evaluate("svg => [...svg.querySelectorAll('path, image')].some(p => p.getBBox().width > 20)")
        assert drawn
    heights = page.locator("svg text").evaluate_all("all => all.map(text => text.getBoundingClientRect().height)")
    assert min(heights) > 9
    # Nothing is closed to who cannot scroll sideways with a mouse.
    for table in page.locator(".scroll").all():
        assert table.get_attribute("tabindex") == "0"


def test_light_and_dark_differ_in_ground_and_in_what_stands_on_it(browser: Any, file: Path) -> None:
    found = {}
    for theme in ("light", "dark"):
        opened = Opened(browser, file, color_scheme=theme)
        found[theme] = opened.page.evaluate(
            "[document.body, document.querySelector('svg text')].map(part => getComputedStyle(part))"
            ".map((style, number) => number ? style.fill : style.backgroundColor)"
        )
        opened.close()
    assert found["light"][0] != found["dark"][0]
    assert found["light"][1] != found["dark"][1]


def test_a_command_is_copied_and_said_so(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, permissions=["clipboard-read", "clipboard-write"])
    button = opened.page.get_by_role("button", name="Copy: Check every byte")
    button.focus()
    opened.page.keyboard.press("Enter")
    opened.page.get_by_role("status").filter(has_text="Copied.").wait_for(state="attached")
    assert opened.page.evaluate("navigator.clipboard.readText()").startswith("gisp verify s3://b/")
    opened.close()


def test_the_keyboard_reaches_the_ladder_first(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "Skip to the ladder"
    opened.close()


def test_without_scripts_nothing_is_missing_but_the_buttons(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, java_script_enabled=False)
    assert opened.page.locator("button:visible").count() == 0
    assert opened.page.get_by_text("gisp verify").is_visible()
    opened.close()


def test_paper_shows_what_is_folded_away(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    closed = opened.page.locator("details:not([open])")
    assert closed.count() > 0
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert closed.count() == 0
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert closed.count() > 0
    assert len(opened.page.pdf(format="A4")) > 10_000
    opened.close()
