"""What the README shows is run: its commands on stories260K, its recipe through the reader."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gisp_tasks.recipe import Recipe
from gisp_tasks.stores.registry import MlflowRegistry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

TINY = {
    "name": "readme",
    "calibration": {"dataset": "embedded", "sequences": 8, "sequence_length": 64},
    "pruning": {"levels": [0.4], "steps": 1},
    "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
    "publish": {"gate": {"max_perplexity_ratio": 100.0}},
}
# Keeps evaluations small; everything before it is the README's own words.
SMALLER = {
    "evaluate": "--set wikitext2.windows=[64] --set wikitext2.limit_tokens=129 --set gsm8k.limit=1 "
    "--set gsm8k.shots=0 --set gsm8k.max_new_tokens=4 --set gsm8k.limit_solutions=1",
    "compare": "--methods gisp,random --seeds 0",
}


def commands(prefix: str) -> list[str]:
    """Lines of the README's console blocks that begin with ``$ prefix``, comments left out."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith(f"$ {prefix} ")]
    assert lines, f"the README shows no {prefix} command"
    return [line.split("  #")[0].strip() for line in lines]


@pytest.mark.timeout(600)
def test_every_gisp_command_runs_as_written(tmp_path, testdata):
    model = testdata / "models" / "stories260K"
    recipe = tmp_path / "readme.yaml"
    tiny = TINY | {"model": {"source": str(model), "dtype": "float32"}}
    registry = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "readme-gisp"}
    tiny["publish"] = tiny["publish"] | {"store": f"file://{tmp_path}/store", "mlflow": registry}
    recipe.write_text(yaml.safe_dump(tiny))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GISP_DATA_ROOT": str(testdata / "data"),
        "HF_HUB_OFFLINE": "1",
        "GISP_CACHE": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": registry["tracking_uri"],
    }
    MlflowRegistry(environment["MLFLOW_TRACKING_URI"]).check()  # makes the file, which retention does not
    shown = commands("gisp")
    assert {shlex.split(line)[1] for line in shown} == {
        *("plan", "run", "verify", "prune", "materialize", "evaluate", "compare", "prune-store"),
        *("approve", "rollback", "history"),
    }
    # A rollback needs an earlier champion: both runs' versions are approved.
    approve = next(line for line in shown if line.startswith("gisp approve"))
    shown.insert(shown.index(approve), approve.replace("VERSION", "1"))
    for line in shown:
        directory = tmp_path / {"prune": "pruned", "compare": "compared"}.get(shlex.split(line)[1], "level")
        words = {
            "RECIPE": str(recipe),
            "RUN": str(next(tmp_path.glob("store/runs/*"), "")),
            "DIRECTORY": str(directory),
            "MODEL_DIRECTORY": str(model),
            "MODEL": registry["model_name"],
            "VERSION": "2",
            "LEVEL": "sp40",
            "model.source=MODEL_DIRECTORY": f"model.source={model}",
            "M": str(model),
            "STORE": f"file://{tmp_path}/store",
            "removal_order.safetensors": str(tmp_path / "pruned" / "removal_order.safetensors"),
            "file:///srv/models": f"file://{tmp_path}/other-store",
            "pruning.steps=10": "pruning.steps=2",
        }
        command = [words.get(word, word) for word in shlex.split(line)]
        command += shlex.split(SMALLER.get(command[1], ""))
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        if "--json" in command:
            assert json.loads(done.stdout)["levels"][0]["name"] == "dense"


def test_the_shown_recipe_is_one():
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    recipe = Recipe.parse(yaml.safe_load(block.group(1)))
    assert recipe.level_names == ("sp20", "sp30", "sp40", "sp50")


def test_make_knows_the_shown_targets():
    for line in commands("make"):
        done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / target).exists(), target
