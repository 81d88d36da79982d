"""The command line on a small trained model: its surface, and that its commands agree with each other."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from gisp_tasks.cli import app
from gisp_tasks.refs import DirectoryListing, sha256_file
from gisp_tasks.stores.artifacts import open_store

SURFACE = {
    "run": ["--json", "--resume", "--set", "--store", "recipe"],
    "plan": ["--json", "--set", "recipe"],
    "prune": ["--json", "--out", "--set", "recipe"],
    "materialize": [
        *("--compensate", "--dtype", "--format", "--gguf-type", "--model", "--order", "--out", "--sparsity"),
        "--width-multiple",
    ],
    "evaluate": ["--dense", "--dtype", "--gguf-type", "--json", "--set", "--task", "--trust-remote-code", "checkpoint"],
    "verify": ["--json", "--public-key", "--registry", "--replay", "--tracking-uri", "run"],
    "history": ["--json", "--tracking-uri", "model"],
    "approve": ["--by", "--json", "--reason", "--tracking-uri", "model", "version"],
    "rollback": ["--by", "--json", "--reason", "--to", "--tracking-uri", "level", "model"],
    "compare": ["--compensation", "--json", "--methods", "--out", "--seeds", "--set", "recipe"],
    "prune-store": ["--json", "--keep-days", "--tracking-uri", "--yes", "store"],
}
SUMMARY_KEYS = ["run_id", "store", "manifest_sha256", "levels"]
LEVEL_KEYS = [
    *("name", "param_sparsity", "parameters", "bytes", "metrics", "uri"),
    *("model_name", "model_version", "alias", "gate", "promotion"),
]
METRIC = "embedded_text_ppl_token_w128"

# stories260K by hand: hidden 64, 5 layers, 4 kv groups of 2 query heads of 8, 172 channels, 512 tied embeddings.
KV_GROUP = (2 * 8 + 8 + 8 + 2 * 8) * 64
CHANNEL = 3 * 64
DECODER = 5 * (2 * 64 + 4 * KV_GROUP + 172 * CHANNEL)
OTHER = 512 * 64 + 64
DENSE = 260_032


@dataclass(frozen=True)
class Finished:
    """A run with one step a task, a directory as store, and MLflow on a database file.

    Args:
        recipe: its file.
        model: directory of the base model.
        mlflow: the database file.
        summary: what `gisp run --json` printed.
    """

    recipe: Path
    model: Path
    mlflow: Path
    summary: dict[str, Any]

    @property
    def prefix(self) -> Path:
        return Path(self.summary["store"].removeprefix("file://"))


@pytest.fixture(scope="module")
def finished(gisp: Any, tmp_path_factory: pytest.TempPathFactory, testdata: Path) -> Finished:
    directory = tmp_path_factory.mktemp("cli")
    recipe, model, mlflow = directory / "recipe.yaml", testdata / "models" / "stories260K", directory / "mlflow.db"
    value = {
        "name": "small",
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.2, 0.4], "steps": 4},
        "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 2049}},
        "export": {"gguf": "q8_0"},
        "publish": {
            "store": f"file://{directory}/store",
            "mlflow": {"tracking_uri": f"sqlite:///{mlflow}", "model_name": "small-gisp"},
            # Between the ratios of the two levels: one passes, one fails.
            "gate": {"max_perplexity_ratio": 2.0},
        },
    }
    recipe.write_text(yaml.safe_dump(value))
    return Finished(recipe, model, mlflow, json.loads(gisp.start("run", str(recipe), "--json").stdout))


def test_the_surface_grows_on_purpose_only() -> None:
    group: Any = typer.main.get_command(app)
    found = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()
    }
    assert found == SURFACE


def test_every_command_explains_itself(gisp: Any) -> None:
    described = gisp.start("--help").stdout
    for name in SURFACE:
        assert name in described
        assert "Usage" in gisp.call(name, "--help").stdout


def test_plan(gisp: Any, finished: Finished) -> None:
    plan = json.loads(gisp.call("plan", str(finished.recipe), "--json").stdout)
    assert (plan["dense_parameters"], plan["dense_bytes"]) == (DENSE, 4 * DENSE) == (DECODER + OTHER, 1_040_128)
    sp20, sp40 = DECODER * 8 // 10 + OTHER, DECODER * 6 // 10 + OTHER
    assert plan["levels"] == [
        {"name": "sp20", "sparsity": 0.2, "max_parameters": sp20, "max_bytes": 4 * sp20, "after_step": 2},
        {"name": "sp40", "sparsity": 0.4, "max_parameters": sp40, "max_bytes": 4 * sp40, "after_step": 4},
    ]
    assert [step["target_sparsity"] for step in plan["steps"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [step["completes"] for step in plan["steps"]] == [[], ["sp20"], [], ["sp40"]]
    assert plan["micro_batch_tokens"] == 2048
    # Six operations a weight and token, of the model as each step finds it.
    assert plan["scoring_flops"] == pytest.approx(6 * 16 * 64 * (4 * DENSE - DECODER * (0.1 + 0.2 + 0.3)))
    logits, activations = 4 * 2048 * 512, 4 * 2048 * 5 * (6 * 64 + 4 * 172)
    assert plan["scoring_bytes"] == 4 * DENSE + 4 * DECODER + logits + activations


def test_plan_names_the_files_for_llama_cpp(gisp: Any, finished: Finished) -> None:
    shown = gisp.call("plan", str(finished.recipe), "--set", "export.gguf=q8_0").stdout
    assert "for llama.cpp, q8_0: levels/sp20/sp20.gguf, levels/sp40/sp40.gguf" in shown
    assert "llama.cpp" not in gisp.call("plan", str(finished.recipe), "--set", "export.gguf=none").stdout


def test_run_summary(finished: Finished) -> None:
    summary = finished.summary
    assert [key for key in summary if key != "step_seconds"] == SUMMARY_KEYS
    assert len(summary["step_seconds"]) == 4
    assert all(list(level) == LEVEL_KEYS for level in summary["levels"])
    dense, *levels = summary["levels"]
    assert (dense["name"], dense["param_sparsity"], dense["parameters"]) == ("dense", 0, DENSE)
    assert {dense[key] for key in ("model_name", "model_version", "alias", "gate", "promotion")} == {None}
    assert [level["name"] for level in levels] == ["sp20", "sp40"]
    for level, target in zip(levels, (0.2, 0.4), strict=True):
        sparsity = 1 - (level["parameters"] - OTHER) / DECODER
        assert level["param_sparsity"] == pytest.approx(sparsity)
        assert target <= sparsity < target + 32 * CHANNEL / DECODER
        assert level["model_name"] == "small-gisp"
        assert level["uri"] == f"{summary['store']}/levels/{level['name']}"
        listing = Path(level["uri"].removeprefix("file://")) / "model.json"
        assert level["bytes"] == DirectoryListing.from_bytes(listing.read_bytes()).size
        ratio = level["metrics"][METRIC] / dense["metrics"][METRIC]
        assert level["gate"] == ("passed" if ratio <= 2.0 else "failed")
        assert level["alias"] == (level["name"] if ratio <= 2.0 else None)
    assert {level["promotion"] for level in levels} == {None}
    assert {level["gate"] for level in levels} == {"passed", "failed"}
    assert {level["model_version"] for level in levels} == {1, 2}


def test_running_again_publishes_nothing(gisp: Any, finished: Finished) -> None:
    before = _mtimes(finished.prefix)
    assert "manifest.json" in before
    again = json.loads(gisp.start_inline("run", str(finished.recipe), "--resume", "--json").stdout)
    assert again == finished.summary
    assert _mtimes(finished.prefix) == before
    from gisp_tasks.stores.registry import MlflowRegistry

    versions = MlflowRegistry(f"sqlite:///{finished.mlflow}").versions("small-gisp")
    assert sorted(version.version for version in versions) == [1, 2]


def test_the_page_shows_what_was_kept_and_what_it_took(finished: Finished) -> None:
    page = (finished.prefix / "report.html").read_text()
    for level in ("sp20", "sp40"):
        record = json.loads((finished.prefix / f"levels/{level}/level.json").read_text())
        assert re.search(rf"keeps {sum(record['kv_groups'])} of \d+ kv groups, {sum(record['channels']):,} of", page)
    for path in finished.prefix.glob("steps/*/timing.json"):
        assert f"<td>{json.loads(path.read_text())['seconds']:.1f}</td>" in page


def test_fused_steps_give_the_same_bytes(gisp: Any, finished: Finished, tmp_path: Path) -> None:
    fused = json.loads(
        gisp.start_inline(
            *("run", str(finished.recipe), "--json", "--store", f"file://{tmp_path}/store"),
            *("--set", "airflow.steps_per_task=3", "--set", f"publish.mlflow.tracking_uri=sqlite:///{tmp_path}/m.db"),
        ).stdout
    )
    prefix = Path(fused["store"].removeprefix("file://"))
    assert prefix != finished.prefix
    found, wanted = (DirectoryListing.of(directory).files for directory in (prefix, finished.prefix))
    assert found.keys() == wanted.keys()
    # Timings and measured speed are of a run, not of its result; records and the page show them.
    differing = {name for name in wanted if found[name] != wanted[name]}
    timed = {"report.html", "manifest.json", *(f"steps/{step:04d}/timing.json" for step in range(1, 5))}
    speed = {f"levels/{level}/evaluation/speed.json" for level in ("dense", "sp20", "sp40")}
    records = {f"levels/{level}/{name}.json" for level in ("sp20", "sp40") for name in ("evaluation", "level")}
    assert differing <= timed | speed | records
    for one, other in zip(fused["levels"], finished.summary["levels"], strict=True):
        assert one["metrics"].keys() == other["metrics"].keys()
        assert one["metrics"][METRIC] == other["metrics"][METRIC]
    compared = wanted.keys() - differing
    assert {"removal_order.safetensors", "steps/0003/scores.safetensors"} <= compared
    assert {f"levels/{level}/model/model.safetensors" for level in ("sp20", "sp40")} <= compared


def test_prune_finds_the_order_of_the_run(gisp: Any, finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = json.loads(gisp.call("prune", str(finished.recipe), "--out", str(out), "--json").stdout)
    assert result["removal_order"] == str(out / "removal_order.safetensors")
    assert result["scores"] == [str(out / f"scores-{step:04d}.safetensors") for step in range(1, 5)]
    from safetensors.numpy import load_file

    # The run's id stands in the metadata, and differs: `prune` publishes nothing to MLflow.
    pairs = {"removal_order.safetensors": "removal_order.safetensors"} | {
        f"scores-{step:04d}.safetensors": f"steps/{step:04d}/scores.safetensors" for step in range(1, 5)
    }
    for own, of_run in pairs.items():
        found, wanted = load_file(out / own), load_file(finished.prefix / of_run)
        assert found.keys() == wanted.keys() != set()
        assert all(np.array_equal(found[name], wanted[name], equal_nan=True) for name in wanted)
    assert not list(out.glob("runs/*/levels"))


@pytest.mark.parametrize("sparsity", [0.2, 0.35])
def test_materialize(gisp: Any, finished: Finished, tmp_path: Path, sparsity: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    order, out = finished.prefix / "removal_order.safetensors", tmp_path / "level"
    arguments = ("materialize", "--model", str(finished.model), "--order", str(order), "--out", str(out))
    printed = gisp.call(*arguments, "--sparsity", str(sparsity)).stdout
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters" in printed
    allowed = DECODER * (1 - sparsity) + OTHER
    assert allowed - 32 * CHANNEL < parameters <= allowed
    ids = AutoTokenizer.from_pretrained(out)("Once upon a time", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    if sparsity == 0.2:
        assert DirectoryListing.of(out).files == _checkpoint(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sparsity", "0.6"), "0.6"),
        (("--sparsity", "0.2", "--dtype", "int8"), "allowed are float32, bfloat16, float16"),
        (("--sparsity", "0.2", "--order", "missing.safetensors"), "no such file"),
    ],
)
def test_materialize_refuses(
    gisp: Any, finished: Finished, tmp_path: Path, change: tuple[str, ...], message: str
) -> None:
    order, out = finished.prefix / "removal_order.safetensors", tmp_path / "level"
    arguments = ("materialize", "--model", str(finished.model), "--order", str(order), "--out", str(out))
    done = gisp.call(*arguments, *change, status=2)
    assert done.stderr.startswith("gisp: ")
    assert message in done.stderr
    assert not out.exists()


def test_materialize_leaves_a_full_directory_alone(gisp: Any, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    order = finished.prefix / "removal_order.safetensors"
    arguments = ("materialize", "--model", str(finished.model), "--order", str(order), "--sparsity", "0.2")
    done = gisp.call(*arguments, "--out", str(tmp_path), status=2)
    assert "it is not an empty directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("level", [0, 1], ids=["dense", "sp20"])
def test_evaluate_agrees_with_the_run(gisp: Any, finished: Finished, level: int) -> None:
    directory = finished.model if level == 0 else finished.prefix / "levels/sp20/model"
    section = ("--set", "embedded_text.windows=[128]", "--set", "embedded_text.limit_tokens=2049")
    done = gisp.call("evaluate", str(directory), "--task", "embedded_text", *section, "--json")
    metrics = json.loads(done.stdout)["embedded_text"]["metrics"]
    assert metrics == finished.summary["levels"][level]["metrics"]


def test_speed_of_any_two_checkpoints(gisp: Any, finished: Finished) -> None:
    level, sizes = finished.prefix / "levels/sp40/model", ("--set", "speed.prompt_tokens=32", "--json")
    arguments = ("evaluate", str(level), "--task", "speed", *sizes, "--dense", str(finished.model))
    metrics = json.loads(gisp.call(*arguments).stdout)["speed"]["metrics"]
    assert metrics["speed_decode_over_dense"] > 0
    assert metrics["speed_weight_bytes"] == 4 * finished.summary["levels"][2]["parameters"]
    refused = gisp.call("evaluate", str(level), "--task", "embedded_text", "--dense", str(finished.model), status=2)
    assert "only `--task speed` reads it" in refused.stderr
    refused = gisp.call("evaluate", str(level), "--task", "embedded_text", "--gguf-type", "q8_0", status=2)
    assert "--gguf-type q8_0 was given, and only `--task speed` reads it" in refused.stderr
    refused = gisp.call("evaluate", str(level), "--task", "speed", "--set", "speed.prompt_tokens=512", status=2)
    assert "context is 512" in refused.stderr


def test_the_file_for_llama_cpp(gisp: Any, finished: Finished, tmp_path: Path) -> None:
    import gguf

    level = finished.prefix / "levels/sp20"
    record = json.loads((level / "level.json").read_text())["gguf"]
    file = level / "sp20.gguf"
    assert (record["key"], record["size"], record["sha256"]) == (
        "levels/sp20/sp20.gguf", file.stat().st_size, sha256_file(file),
    )  # fmt: skip
    config = json.loads((level / "model/config.json").read_text())
    widths = [layer["intermediate_size"] for layer in config["per_layer_config"].values()]
    assert gguf.GGUFReader(file).fields["deci.feed_forward_length"].contents() == widths
    order = str(finished.prefix / "removal_order.safetensors")
    arguments = ("materialize", "--model", str(finished.model), "--order", order, "--sparsity", "0.2")
    gisp.call(*arguments, "--out", str(tmp_path / "level"), "--format", "gguf", "--gguf-type", "q8_0")
    (again,) = (tmp_path / "level").iterdir()
    assert again.name == "sp20.gguf"
    found, published = (
        {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(path).tensors} for path in (again, file)
    )
    assert found == published
    refused = gisp.call(*arguments, "--out", str(tmp_path / "other"), "--gguf-type", "q8_0", status=2)
    assert "without --format gguf" in refused.stderr


def test_materialize_from_and_to_s3(gisp: Any, finished: Finished, s3: Any) -> None:
    store = open_store(f"s3://{s3.bucket}/archive")
    store.put("removal_order.safetensors", finished.prefix / "removal_order.safetensors")
    for path in finished.model.glob("*.*"):
        store.put(f"base/{path.name}", path)
    places = ("--model", f"{store.uri}/base", "--out", f"{store.uri}/ladder/sp20")
    arguments = ("materialize", "--sparsity", "0.2", "--order")
    missing = gisp.call(*arguments, f"{store.uri}/nothing.safetensors", *places, status=2)
    assert "no such object" in missing.stderr
    gisp.call(*arguments, f"{store.uri}/removal_order.safetensors", *places)
    again = gisp.call(*arguments, f"{store.uri}/removal_order.safetensors", *places, status=2)
    assert "something is stored there" in again.stderr
    listing = store.stat("ladder/sp20.json")
    assert listing is not None
    written = DirectoryListing.from_bytes(store.read(listing)).files
    assert written == _checkpoint(finished)
    store.verify_directory("ladder/sp20")


def test_the_model_card(finished: Finished) -> None:
    level = finished.prefix / "levels/sp20"
    card = (level / "model/README.md").read_text()
    record = json.loads((level / "level.json").read_text())
    assert record["package"]["model/README.md"]["sha256"] == sha256_file(level / "model/README.md")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    dense, sp20, _ = (entry["metrics"][METRIC] for entry in finished.summary["levels"])
    assert f"| {METRIC} | {sp20:.4g} | {dense:.4g} | embedded / test (embedded), 2,032 tokens, windows of 128" in text
    assert f"{record['parameters']:,} parameters instead of {DENSE:,}" in text
    for layer, width in enumerate(record["channels"]):
        assert f"| {layer} | {record['query_heads'][layer]} | {record['kv_groups'][layer]} | {width} |" in text
    assert "llama-cli -m sp20.gguf" in text


def _checkpoint(finished: Finished) -> dict[str, Any]:
    """What was published of sp20's checkpoint; the model card came later."""
    found = DirectoryListing.from_bytes((finished.prefix / "levels/sp20/model.json").read_bytes()).files
    assert "README.md" not in found
    return dict(found)


def _mtimes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in files}
