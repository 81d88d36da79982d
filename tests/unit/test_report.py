"""What a person sees of a finished run: a table that stays small, and a page with everything behind it."""

import dataclasses
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import gisp_tasks
from gisp_tasks.console import ladder_table
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.recipe import COMMONSENSE_TASKS
from gisp_tasks.report import Places, metric_names, render, summarise_scores
from gisp_tasks.report.heatmaps import BINS, binned

PERPLEXITY = "wikitext2_ppl_token_w128"
NOWHERE = Places()
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def commonsense(perplexity: float, accuracy: float) -> dict[str, float]:
    found = {PERPLEXITY: perplexity, f"{PERPLEXITY}_stderr": 7.7}
    for task in COMMONSENSE_TASKS:
        found |= {f"{task}_acc": accuracy, f"{task}_acc_stderr": 0.0125, f"{task}_acc_norm": accuracy / 2}
    return found | {"commonsense_qa_acc": accuracy, "commonsense_qa_acc_stderr": 0.005}


MANY = (commonsense(20, 0.625), commonsense(31, 0.5), commonsense(90, 0.3))


class Page(HTMLParser):
    """The page as a reader meets it: text of elements by tag, and their attributes."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "use", "path", "image"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, first: str, *, having: str = "") -> list[str]:
        """The one row that begins so, and has a cell with that text."""
        found = [row for row in self.rows if row and row[0] == first and any(having in cell for cell in row)]
        assert len(found) == 1, (first, found)
        return [" ".join(cell.split()) for cell in found[0]]

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


@pytest.fixture(scope="module")
def plain(finished_run):
    """The page of a run that measured one perplexity."""
    return rendered(finished_run())


@pytest.fixture(scope="module")
def rich(finished_run):
    """The page of a run that measured the tasks too."""
    return rendered(finished_run(metrics=MANY))


def rendered(run: Any, places: Places = NOWHERE) -> str:
    return render(run.summary, manifest=run.manifest, trajectory=run.trajectory, places=places)


def test_a_metric_is_a_headline_or_of_one_task_and_no_standard_error():
    headline, by_task = metric_names([{"metrics": metrics} for metrics in MANY])
    assert headline == [PERPLEXITY, "commonsense_qa_acc"]
    assert by_task == [f"{task}_{kind}" for task in COMMONSENSE_TASKS for kind in ("acc", "acc_norm")]


def test_the_terminal_shows_the_mean_only(finished_run):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ladder_table(finished_run(metrics=MANY).summary))
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "commonsense_qa_acc" in line]
    assert "0.625" in line
    assert " 0.5 " in line
    assert not any(f" {task}_acc" in text for task in COMMONSENSE_TASKS)


def test_the_ladder_has_sizes_metrics_and_how_many_times_the_dense_perplexity(plain):
    page = Page(plain)
    assert page.row("sp20", having="MB")[1:6] == ["passed", "20.0 %", "800,000", "1.6 MB", f"31{TIMES}1.55"]
    assert page.row("sp40", having="MB")[1::5] == ["failed", "2"]
    assert page.row("dense", having="MB")[5:] == ["20", DASH]


def test_single_tasks_have_a_table_with_their_errors_and_their_data(plain, rich):
    page = Page(rich)
    assert page.row("piqa_acc", having="±")[1:] == ["0.6250 ± 0.0125", "0.5000 ± 0.0125", "0.3000 ± 0.0125"]
    assert page.row("piqa_acc_norm", having="0.3125")[1:] == ["0.3125", "0.2500", "0.1500"]
    assert page.row("piqa_acc", having="questions")[-1] == "438 questions, 0 shots"
    assert "Task by task" not in plain
    assert "254 tokens" in plain


def test_steps_that_count_structures_say_so(finished_run, plain):
    """Under compat: reference no step has a sparsity to reach; the page used to fail on it."""
    assert Page(plain).row("3", having="3.5")[2] == "40.00 %"
    run = finished_run(steps=1)
    run.manifest["steps"][0] |= {"target_sparsity": None, "structure_ratio": 0.0}
    assert Page(rendered(run)).row("1", having="3.5")[2] == "0.00 % of the heads and channels"


def test_each_check_of_the_gate_and_each_reload_proof(finished_run):
    run = finished_run()
    for level, value in zip(run.manifest["levels"][1:], (1_000_000, 2_000_000), strict=True):
        passed = value < 1_500_000
        check = {"name": "bytes", "metric": "bytes", "value": value, "limit": 1_500_000, "passed": passed}
        level["gate"]["checks"].append(check)
    page = Page(rendered(run))
    assert page.row("bytes") == ["bytes", "bytes", "1,500,000", "1,000,000passed", "2,000,000 ✗failed"]
    assert page.row("sp20", having="all equal")[1:] == ["1.5e-05", "0.0002", "64", "16, all equal", "torch 2"]


def test_what_was_recorded_cannot_be_markup(finished_run):
    run = finished_run()
    run.manifest["model"]["licence"] = "<script>alert(1)</script>"
    html = rendered(run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<script") == 1


def test_the_same_run_gives_the_same_bytes(finished_run, rich):
    assert rendered(finished_run(metrics=MANY)) == rich


def test_every_picture_says_what_it_shows(finished_run, rich):
    run = finished_run(metrics=MANY)
    pictures = list(Page(rich).all("svg"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
    labels = " ".join(str(svg["aria-label"]) for svg in pictures)
    assert f"{PERPLEXITY}: dense 20, sp20 31, sp40 90" in labels
    keep = run.trajectory.keep["sp40"]
    assert f"Level sp40 keeps {keep.attention.sum()} of 18 kv groups and {keep.mlp.sum()} of 1,200 channels" in labels
    # Perplexity, accuracy, a map a level, scores of both kinds, time and memory.
    assert len(pictures) == 2 + 2 + 2 + 2


def test_identifiers_are_unique_and_links_lead_somewhere(rich):
    page = Page(rich)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for link in page.all("a"):
        assert str(link["href"]).removeprefix("#") in names
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "data-copies"):
            assert attributes.get(key) is None or attributes[key] in names
    references = re.findall(r'(?:xlink:href="|url\()#([\w-]+)', rich)
    assert references
    assert set(references) <= set(names)


def test_nothing_is_asked_of_a_server(finished_run):
    html = rendered(finished_run(metrics=MANY), Places(tracking_uri="http://127.0.0.1:5000", mlflow_run="x"))
    used = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', html)
    targets = [first or second for first, second in used]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)


def test_links_only_where_another_machine_can_follow_them(finished_run):
    known = {"experiment_id": "4", "mlflow_run": "abc"}
    run = finished_run()
    shared = Places(
        tracking_uri="https://mlflow.example/", airflow_run="https://airflow.example/dags/d/runs/r", **known
    )
    links = [str(link["href"]) for link in Page(rendered(run, shared)).all("a")]
    assert "https://mlflow.example/#/experiments/4/runs/abc" in links
    assert "https://mlflow.example/#/models/m/versions/1" in links
    assert "https://airflow.example/dags/d/runs/r" in links
    private = Places(tracking_uri="http://127.0.0.1:5000", airflow_run="http://localhost:8080/dags/d/runs/r", **known)
    html = rendered(run, private)
    assert all(str(link["href"]).startswith("#") for link in Page(html).all("a"))
    assert "http://127.0.0.1:5000" in html


@pytest.mark.parametrize(
    "address", ["http://localhost:5000", "http://0.0.0.0:5000", "http://[::1]:5000", "sqlite:////srv/mlflow.db"]
)
def test_an_address_of_this_machine_alone_is_no_link(address):
    places = Places(tracking_uri=address, airflow_run=f"{address}/dags/d", experiment_id="4", mlflow_run="abc")
    assert places.mlflow_link is None
    assert places.airflow_link is None
    assert places.version_link({"model_name": "m", "model_version": 1}) is None


def test_commands_can_be_typed(finished_run):
    run = finished_run()
    run.summary["store"] = "s3://b/a b"
    html = rendered(run)
    assert "gisp verify &#39;s3://b/a b&#39;" in html
    assert "aws s3 cp --recursive s3://b/runs/0123456789ab/levels/sp20/model sp20" in html


def test_a_bin_is_the_share_of_its_channels_that_is_kept():
    kept = np.random.default_rng(0).random((3, 1001)) > 0.4
    found = binned(kept, 10)
    edges = [1001 * number // 10 for number in range(11)]
    for layer in range(3):
        for number in range(10):
            part = kept[layer, edges[number] : edges[number + 1]]
            assert found[layer, number] == pytest.approx(part.sum() / len(part))
    assert binned(kept[:, :7], 96).tolist() == kept[:, :7].astype(float).tolist()


def test_quantiles_are_of_what_could_be_removed():
    scores = np.array([[np.nan, np.inf, 1.0], [2.0, 3.0, 4.0]], dtype=np.float32)
    removed = np.array([[False, False, True], [True, False, False]])
    found = summarise_scores(scores, removed)
    assert found is not None
    assert found.num_scored == 4
    assert found.quantiles[2] == 2.5
    assert found.highest_removed == 2.0
    assert summarise_scores(scores[:1, :2], removed[:1, :2]) is None
    assert summarise_scores(scores, np.zeros_like(removed)).highest_removed is None


def test_what_was_not_recorded_is_left_out(finished_run):
    run = finished_run()
    first, *others = run.trajectory.steps
    bare = dataclasses.replace(first, attention=None, seconds=None, peak_bytes=None)
    run.trajectory = dataclasses.replace(run.trajectory, steps=(bare, *others))
    page = Page(rendered(run))
    assert page.row("1", having="3.5")[4:6] == [DASH, DASH]
    run.trajectory = dataclasses.replace(run.trajectory, steps=(bare,) * len(run.trajectory.steps))
    html = rendered(run)
    assert "peak memory by step" not in html
    assert "Scores of kv groups" not in html
    nothing = dataclasses.replace(bare, mlp=None)
    run.trajectory = dataclasses.replace(run.trajectory, steps=(nothing,) * len(run.trajectory.steps))
    assert "Scores of" not in rendered(run)


def test_a_level_without_attention_or_channels_in_a_layer_is_drawn(finished_run):
    run = finished_run()
    keep = run.trajectory.keep["sp40"]
    empty = KeepSets(keep.attention & (np.arange(6) > 0)[:, None], keep.mlp & (np.arange(6) > 1)[:, None])
    run.trajectory = dataclasses.replace(run.trajectory, keep={"sp40": empty})
    assert "The narrowest layer is 0 with 0 % of its channels" in rendered(run)


def test_the_page_of_a_large_model_stays_small(finished_run):
    """80 layers of 28,672 channels: bins, not channels, decide the size."""
    html = rendered(finished_run(layers=80, groups=8, channels=28672, steps=30, metrics=MANY))
    assert len(html.encode()) < 3_000_000
    assert len(html.encode()) - len(rendered(finished_run(layers=80, groups=8, channels=BINS, steps=30))) < 1_000_000


_STYLE = (Path(gisp_tasks.__file__).parent / "templates/report/page.css").read_text()


def _themes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", _STYLE, flags=re.DOTALL)[:2]
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    return {"light": light, "dark": dark}


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_as_accessibility_asks(theme):
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for lines that carry meaning."""
    colours = _themes()[theme]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((_luminance(colours[one]), _luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card", "soft"):
        for text in ("ink", "muted", "link", "bad", "good"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("good", "good-soft") >= 4.5
    assert contrast("bad", "bad-soft") >= 4.5
    for number in range(1, 7):
        assert contrast(f"series-{number}", "card") >= 3
