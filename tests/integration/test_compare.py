"""`gisp compare` on a trained model and real stories: the numbers are those of the checkpoints it stands for."""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gisp_tasks.cli import app
from gisp_tasks.comparison import comparison_table, metrics_of, write_plot
from gisp_tasks.evaluation.perplexity import token_perplexity
from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks import compare as compare_module
from gisp_tasks.tasks.compare import METHODS, compare

METRIC = "wikitext2_ppl_token_w128"


@pytest.fixture(scope="module")
def recipe(testdata: Path, mirror_of_stories: Path) -> Recipe:
    return Recipe.parse(
        {
            "name": "compare",
            "model": {"source": str(testdata / "models/stories260K"), "dtype": "float32"},
            "calibration": {"dataset": "wikitext2", "sequences": 16, "sequence_length": 64},
            "pruning": {"levels": [0.2, 0.4], "steps": 2, "protect": {"first_layers": 1}},
            "evaluation": {"wikitext2": {"windows": [128], "limit_tokens": 2049}},
            "publish": {"store": "s3://nowhere/to-be-written"},
        }
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("comparison")
    return compare(recipe, methods=METHODS, seeds=(0, 1), compensation=True, out=out), out


def test_every_method_meets_the_same_sparsity(finished: tuple[dict[str, Any], Path], recipe: Recipe) -> None:
    cells = [cell for cell in finished[0]["cells"] if cell["method"] != "dense"]
    found = {(cell["method"], cell["seed"], cell["level"], cell["compensation"]) for cell in cells}
    assert found == set(itertools.product(METHODS, (0, 1), (0.2, 0.4), (False, True)))
    geometry = geometry_of(json.loads((Path(recipe.model.source) / "config.json").read_text()))
    # The last removal of each method, widths rounded, may take more than was asked for.
    most = max(geometry.kv_group_parameters, 32 * geometry.channel_parameters) / geometry.decoder_parameters
    assert all(0 <= cell["param_sparsity"] - cell["level"] <= most for cell in cells)


def test_the_order_of_the_methods_is_sane(finished: tuple[dict[str, Any], Path]) -> None:
    rows = [row for row in finished[0]["summary"] if row["metric"] == METRIC]
    means = {(row["method"], row["compensation"], row["level"]): row["mean"] for row in rows}
    assert means["dense", False, None] < means["gisp", False, 0.2] < means["gisp", False, 0.4]
    assert means["gisp", False, 0.4] < means["random", False, 0.4]
    assert all(means[method, True, 0.4] < means[method, False, 0.4] for method in ("gisp", "one-shot", "random"))


def test_summary_is_mean_and_spread_of_the_cells(finished: tuple[dict[str, Any], Path]) -> None:
    for row in finished[0]["summary"]:
        key = (row["method"], row["compensation"], row["level"])
        values = [
            cell["metrics"][row["metric"]]
            for cell in finished[0]["cells"]
            if (cell["method"], cell["compensation"], cell["level"]) == key
        ]
        assert row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["n"] == len(values)
        assert row["std"] == (pytest.approx(statistics.stdev(values)) if len(values) > 1 else None)


@pytest.mark.parametrize("method", ["gisp", "gate-fisher", "wanda-sp"])
def test_a_cell_is_the_perplexity_of_the_exported_checkpoint(
    finished: tuple[dict[str, Any], Path], recipe: Recipe, tmp_path: Path, method: str
) -> None:
    import torch
    from transformers import AutoTokenizer

    from gisp_tasks.data import sources

    base = Path(recipe.model.source)
    geometry = geometry_of(json.loads((base / "config.json").read_text()))
    (path,) = finished[1].glob(f"cells-*/{method}-seed1.safetensors")
    keep = RemovalOrder.load(path)[0].level(0.4, geometry=geometry, width_multiple=32)
    write_checkpoint(base, tmp_path / "level", geometry=geometry, keep=keep, dtype="float32")
    text = "\n\n".join(row["text"] for row in sources.find("wikitext2", "test").rows())
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"][:2049])
    model = load_model(tmp_path / "level", dtype="float32", trust_remote_code=True)
    (cell,) = (
        cell
        for cell in finished[0]["cells"]
        if (cell["method"], cell["seed"], cell["level"], cell["compensation"]) == (method, 1, 0.4, False)
    )
    assert cell["metrics"][METRIC] == pytest.approx(token_perplexity(model, ids, window=128).ppl, rel=1e-4)


def test_agreement_has_every_pair_that_shares_a_method_or_a_seed(finished: tuple[dict[str, Any], Path]) -> None:
    pairs = {(tuple(entry["methods"]), tuple(entry["seeds"])) for entry in finished[0]["agreement"]}
    assert (("gisp", "gisp"), (0, 1)) in pairs
    assert (("gisp", "gate-fisher"), (0, 0)) in pairs
    assert not any(a != b and s != t for (a, b), (s, t) in pairs)
    by_pair = {(tuple(e["methods"]), tuple(e["seeds"])): e for e in finished[0]["agreement"]}
    # The first step of both is one and the same scoring pass.
    first = by_pair[("gisp", "one-shot"), (0, 0)]["rank_correlation"]
    assert first == {"attention": pytest.approx(1.0), "mlp": pytest.approx(1.0)}
    # Nothing of magnitude depends on the draw, everything of random does.
    assert by_pair[("magnitude", "magnitude"), (0, 1)]["overlap"]["sp40"] == {"attention": 1.0, "mlp": 1.0}
    assert by_pair[("random", "random"), (0, 1)]["overlap"]["sp40"]["mlp"] < 0.75
    assert abs(by_pair[("random", "random"), (0, 1)]["rank_correlation"]["mlp"]) < 0.2


def test_an_interrupted_comparison_measures_only_what_is_missing(
    finished: tuple[dict[str, Any], Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = finished
    (lost,) = out.glob("compensated-*/one-shot-seed0-sp20.json")
    lost.unlink()
    measured: list[str] = []
    measure_model = compare_module.measure_model

    def counting(*arguments: Any) -> Any:
        measured.append(arguments[2])
        return measure_model(*arguments)

    monkeypatch.setattr(compare_module, "measure_model", counting)
    again = compare(recipe, methods=METHODS, seeds=(0, 1), compensation=True, out=out)
    assert measured == ["wikitext2"]
    assert again == result


def test_table_and_plot_show_every_method(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    result = finished[0]
    assert metrics_of(result) == [METRIC]
    table = comparison_table(result, METRIC)
    labels = list(table.columns[0].cells)
    assert labels == [name for method in METHODS for name in (method, f"{method} + least squares")]
    write_plot(result, METRIC, tmp_path / "a.svg")
    write_plot(result, METRIC, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert all(f">{label}<" in text for label in labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gisp,sparsegpt"], "unknown: sparsegpt"),
        (["--methods", "gisp,gisp"], "one twice"),
        (["--seeds", "0,0"], "one twice"),
        (["--seeds", "one"], "no list of whole numbers"),
        (["--set", "evaluation.wikitext2=null", "--set", "publish.gate.max_perplexity_ratio=null"], "no evaluation"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    recipe: Recipe, tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.identity() | {"publish": {"store": "s3://nowhere/at-all"}}))
    done = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
