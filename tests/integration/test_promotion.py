"""A run that asks for approval, without a scheduler: what it leaves behind, and every answer a person may give."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.registry import MlflowRegistry
from gisp_tasks.tasks import champions
from gisp_tasks.tasks.promote import promote, request
from gisp_tasks.tasks.register_model import register_model

MODEL = "small-gisp"


class Asked:
    """A run whose levels were registered: sp30 and sp50 passed their gate and ask, sp20 missed it."""

    def __init__(self, recipe: Path, summary: dict[str, Any]) -> None:
        self.recipe_file = recipe
        self.summary = summary
        self.levels = {level["name"]: level for level in summary["levels"]}
        self.recipe = Recipe.load(recipe)
        self.data = self.recipe.model_dump(mode="json")
        self.store = open_store(summary["store"])
        assert self.recipe.publish.mlflow
        self.registry = MlflowRegistry(self.recipe.publish.mlflow.tracking_uri)

    def ref(self, key: str) -> dict[str, Any]:
        ref = self.store.stat(key)
        assert isinstance(ref, ArtifactRef)
        return ref.to_dict()

    def answer(self, level: str, key: str, **answer: Any) -> bool:
        """What the DAG's task does with what `LevelApproval` hands it."""
        given = {"key": key, "at": "2026-01-02T03:04:05.678+00:00", "approved": True, "by": ["ana"], "reason": "good"}
        reference = self.ref(Keys.level(level, "level.json"))
        return promote(self.data, self.ref(Keys.PLAN), reference, given | answer)

    def ask(self, level: str) -> dict[str, Any] | None:
        return request(self.data, self.ref(Keys.PLAN), self.ref(Keys.level(level, "level.json")))

    def history(self) -> dict[str, Any]:
        found = champions.history(self.registry, MODEL)
        assert found["problems"] == []
        return found


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes an empty directory where a client of an SQLite file runs; and it reports home by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def asked(gisp: Any, tmp_path_factory: pytest.TempPathFactory, testdata: Path) -> Asked:
    directory = tmp_path_factory.mktemp("promotion")
    recipe = directory / "recipe.yaml"
    value = {
        "name": "small",
        "model": {"source": str(testdata / "models" / "stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.2, 0.3, 0.5], "steps": 2},
        "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
        "publish": {
            "store": f"file://{directory}/store",
            "mlflow": {"tracking_uri": f"sqlite:///{directory}/mlflow.db", "model_name": MODEL},
            # Between the checkpoints' sizes.
            "gate": {"max_perplexity_ratio": None, "max_bytes": 800_000},
            "promotion": {"by": "approval", "approvers": ["ana", "ben"]},
        },
    }
    recipe.write_text(yaml.safe_dump(value))
    return Asked(recipe, json.loads(gisp.start_inline("run", str(recipe), "--json").stdout))


def test_without_a_person_the_levels_that_passed_await_approval(asked: Asked) -> None:
    states = {name: (level["gate"], level["promotion"]) for name, level in asked.levels.items()}
    assert states == {
        "dense": (None, None),
        "sp20": ("failed", None),
        "sp30": ("passed", "awaiting approval"),
        "sp50": ("passed", "awaiting approval"),
    }
    assert asked.history()["champions"] == {}
    events = {(event["action"], event["level"], *event["approvers"]) for event in asked.history()["events"]}
    assert events == {("requested", level, "ana", "ben") for level in ("sp30", "sp50")}


def test_every_check_of_the_gate_is_in_the_record(asked: Asked) -> None:
    manifest = json.loads(asked.store.read(asked.store.stat(Keys.MANIFEST)))
    for level in manifest["levels"][1:]:
        checks = {check["name"]: (check["value"], check["limit"], check["passed"]) for check in level["gate"]["checks"]}
        proof = level["reload"]
        assert checks == {
            "reload_logits": (proof["max_logit_difference"], proof["tolerance"], True),
            "reload_greedy": (True, True, True),
            "bytes": (level["bytes"], 800_000, level["name"] != "sp20"),
        }
    assert '<td class="failed">' in asked.store.read(asked.store.stat(Keys.REPORT)).decode()


def test_the_question_says_what_changes(asked: Asked) -> None:
    before = asked.history()["events"]
    question = asked.ask("sp30")
    assert asked.history()["events"] == before  # the open request is this one
    version = asked.levels["sp30"]["model_version"]
    assert question["subject"] == f"Version {version} of small-gisp: champion of sp30?"
    ppl = asked.levels["dense"]["metrics"]["embedded_text_ppl_token_w128"]
    assert f"| embedded_text_ppl_token_w128 | {ppl:.4g} |" in question["body"]
    assert "| bytes (bytes) | 800,000 |" in question["body"]
    assert "points to no version" in question["body"]
    assert asked.ask("sp20") is None


def test_the_answers(asked: Asked) -> None:
    """In the order in which a level may see them; a second attempt at each changes nothing."""
    said = [
        ({"by": [], "approved": False, "reason": ""}, ("timed_out", "nobody", ""), False),
        ({"approved": False, "reason": "too slow"}, ("rejected", "ana", "too slow"), False),
        (
            {"by": ["eve", "Eve E."]},
            ("rejected", "eve", "approved by eve, who is not among the approvers ana, ben"),
            False,
        ),
        ({"by": ["7", "ben"], "reason": None}, ("promoted", "ben", ""), True),
    ]
    for number, (answer, entered, champion) in enumerate(said):
        for _ in range(2):
            assert asked.answer("sp50", f"answer {number}", **answer) is champion
        events = [event for event in asked.history()["events"] if event["level"] == "sp50"]
        assert len(events) == number + 2
        assert entered in {(event["action"], event["by"], event["reason"]) for event in events}
    version = asked.levels["sp50"]["model_version"]
    assert asked.history()["champions"] == {"champion-sp50": version}
    assert asked.ask("sp50") is None
    # A yes that comes after another one, and silence, add nothing.
    assert asked.answer("sp50", "late")
    assert asked.answer("sp50", "silence", by=[], approved=False)
    assert len([event for event in asked.history()["events"] if event["level"] == "sp50"]) == len(said) + 1


def test_a_person_approves_later(gisp: Any, asked: Asked) -> None:
    uri = asked.recipe.publish.mlflow.tracking_uri
    version = asked.levels["sp30"]["model_version"]
    command = ("approve", MODEL, str(version), "--reason", "good on ours", "--tracking-uri", uri)
    assert "names as approvers: ana, ben" in " ".join(gisp.call(*command, "--by", "eve", status=2).stderr.split())
    done = json.loads(gisp.call(*command, "--by", "ben", "--json").stdout)
    assert (done["alias"], done["champion"], done["from_version"]) == ("champion-sp30", version, None)
    assert asked.history()["champions"]["champion-sp30"] == version


def test_verify_knows_the_history(gisp: Any, asked: Asked, tmp_path: Path) -> None:
    store = Path(asked.summary["store"].removeprefix("file://"))
    run = tmp_path / store.name
    shutil.copytree(store, run)
    command = ("verify", f"file://{run}", "--no-registry")
    gisp.call(*command)
    entry = run / Keys.HISTORY / "0001.json"
    entry.write_text(entry.read_text().replace('"small"', '"other"'))
    assert "was edited" in " ".join(gisp.call(*command, status=1).stdout.split())


@pytest.mark.slow
def test_the_run_again_asks_nothing_twice(gisp: Any, asked: Asked) -> None:
    asked.answer("sp50", "a yes")
    before = asked.history()
    again = json.loads(gisp.start_inline("run", str(asked.recipe_file), "--json").stdout)
    states = {version["version"]: version["state"] for version in before["versions"]}
    assert {level["model_version"]: level["promotion"] for level in again["levels"][1:]} == states
    assert states[asked.levels["sp50"]["model_version"]] == "champion"
    assert again["manifest_sha256"] == asked.summary["manifest_sha256"]
    assert asked.history() == before


def test_without_approval_the_gate_decides(asked: Asked) -> None:
    publish = asked.data["publish"]
    mlflow = publish["mlflow"] | {"model_name": "gated"}
    data = asked.data | {"publish": publish | {"mlflow": mlflow, "promotion": {"by": "gate"}}}
    plan = asked.ref(Keys.PLAN)
    for level, passed in (("sp20", False), ("sp50", True), ("sp50", True)):
        record = asked.ref(Keys.level(level, "level.json"))
        register_model(data, plan, record)
        assert promote(data, plan, record, None) is passed
    found = champions.history(asked.registry, "gated")
    assert found["problems"] == []
    assert found["champions"] == {"champion-sp50": 2}
    (event,) = found["events"]
    assert (event["action"], event["by"], event["via"], event["version"]) == ("promoted", "small", "recipe", 2)
