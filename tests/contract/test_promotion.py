"""Champions on a real registry (MLflow on SQLite): decided once, recoverable, readable back, tampering shows."""

import getpass
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gisp_tasks.cli import app
from gisp_tasks.errors import InputError, IntegrityError, RegistryUnavailableError
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.history import Candidate, Decision, RunHistory
from gisp_tasks.stores.registry import LevelVersion, MlflowRegistry, champion_alias
from gisp_tasks.tasks import champions
from gisp_tasks.tasks.promotion import Promotable, decide, finish, promotion_state

LEVEL = "sp37.5"
ALIAS = "champion-sp37_5"
CALLS = ("append", "set_alias", "tag")


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes an empty directory where a client of an SQLite file runs; and it reports home by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    MlflowRegistry(uri).check()
    return uri


@pytest.fixture
def registry(tracking_uri: str) -> MlflowRegistry:
    return MlflowRegistry(tracking_uri)


@pytest.fixture(scope="module")
def mlflow_run(tracking_uri: str) -> str:
    return MlflowRegistry(tracking_uri).open_run(experiment="promotion", run_id="0", parameters={}, datasets=[])


@pytest.fixture
def model_name() -> str:
    return f"model-{uuid.uuid4().hex}"


Register = Callable[..., Promotable]


@pytest.fixture
def register(registry: MlflowRegistry, mlflow_run: str, model_name: str, tmp_path: Path) -> Register:
    """A finished run with one registered level, each time another one."""

    def register(
        *, run_id: str = "", gate_passed: bool = True, level: str = LEVEL, finished: bool = True
    ) -> Promotable:
        run_id = run_id or uuid.uuid4().hex[:12]
        store = open_store(f"file://{tmp_path}/store/runs/{run_id}")
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "model.safetensors").write_text(run_id + level)
        digest = store.put_directory(f"levels/{level}/model", checkpoint).sha256
        if finished:
            store.put_bytes("manifest.json", f"manifest of {run_id}".encode())
        version = registry.register_level(
            LevelVersion(
                model_name=model_name,
                level=level,
                source=f"{store.uri}/levels/{level}",
                digest=digest,
                run_id=run_id,
                mlflow_run=mlflow_run,
                gate_passed=gate_passed,
            )
        )
        return Promotable(registry, version)

    return register


def yes(key: str, action: Any = "promoted") -> Decision:
    return Decision(action=action, key=key, at="2026-01-02T03:04:05.678+00:00", by="ana", via="airflow", reason="good")


def fresh(promotable: Promotable) -> Promotable:
    """As another process finds it."""
    versions = promotable.registry.versions(promotable.version.name)
    return Promotable(promotable.registry, next(v for v in versions if v.version == promotable.version.version))


def entry_file(promotable: Promotable, number: int) -> Path:
    return Path(promotable.store.uri.removeprefix("file://")) / f"history/{number:04d}.json"


def test_a_promotion_is_entered_moves_the_alias_and_is_tagged(register: Register) -> None:
    first, second = register(), register()
    decide(first, yes("one"))
    entry = decide(second, yes("two"))
    assert second.registry.aliases(second.version.name)[ALIAS] == second.version.version == 2
    written = json.loads(entry_file(second, 1).read_bytes())
    assert written == {
        "number": 1,
        "previous": second.store.stat("manifest.json").sha256,
        "action": "promoted",
        "key": "two",
        "at": "2026-01-02T03:04:05.678+00:00",
        "by": "ana",
        "via": "airflow",
        "reason": "good",
        "approvers": [],
        "model_name": second.version.name,
        "version": 2,
        "level": LEVEL,
        "alias": ALIAS,
        "from_version": 1,
    }
    tag = json.loads(fresh(second).version.tags["gisp.history.0001"])
    assert tag.pop("applied_at")
    assert tag == {**written, "sha256": entry.sha256}


def test_the_same_decision_twice_is_one_entry(register: Register) -> None:
    level = register()
    assert decide(level, yes("one")) == decide(fresh(level), yes("one"))
    assert len(level.entries()) == 1
    assert finish(fresh(level)) == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_call_is_made_good(
    register: Register, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    decide(register(), yes("zero"))
    level = register()
    owner = RunHistory if call == "append" else MlflowRegistry
    whole = getattr(owner, call)

    def dies(*arguments: Any) -> None:
        if after:
            whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, dies)
        with pytest.raises(KeyboardInterrupt):
            decide(level, yes("one"))
    decide(fresh(level), yes("one"))
    assert level.champion() == 2
    (entry,) = level.entries()
    assert entry.candidate.from_version == 1
    found = champions.history(level.registry, level.version.name)
    assert found["problems"] == []
    assert sorted(event["version"] for event in found["events"]) == [1, 2]


def test_a_later_decision_is_not_undone_by_an_attempt_that_comes_late(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = register(), register()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowRegistry, "set_alias", lambda *_: (_ for _ in ()).throw(RegistryUnavailableError("gone")))
        with pytest.raises(RegistryUnavailableError):
            decide(early, yes("one"))
    decide(late, yes("two"))
    decide(fresh(early), yes("one"))
    assert early.champion() == late.version.version
    found = champions.history(early.registry, early.version.name)
    applied = {event["version"]: bool(event["applied_at"]) for event in found["events"]}
    assert (applied, found["problems"]) == ({1: False, 2: True}, [])


def test_what_missed_its_gate_or_was_changed_becomes_no_champion(register: Register) -> None:
    failed = register(gate_passed=False)
    with pytest.raises(InputError, match=r"gate=failed\. Only versions that passed their gate"):
        decide(failed, yes("one"))
    level = register()
    Path(level.store.uri.removeprefix("file://"), "levels", LEVEL, "model/model.safetensors").write_text("changed!")
    with pytest.raises(IntegrityError, match="changed after it was published"):
        decide(level, yes("one"))
    assert level.champion() is None
    assert not failed.entries()
    assert not level.entries()


def test_an_unfinished_run_has_no_champion(register: Register) -> None:
    with pytest.raises(InputError, match="has no manifest yet"):
        decide(register(finished=False), yes("one"))


def test_levels_of_one_run_share_its_chain(register: Register) -> None:
    one, other = register(run_id="0123456789ab"), register(run_id="0123456789ab", level="sp50")
    first, second = decide(one, yes("a")), decide(other, yes("b"))
    assert (first.number, second.number, second.previous) == (1, 2, first.sha256)
    assert other.registry.aliases(other.version.name) == {
        "sp37_5": 1, "sp50": 2, ALIAS: 1, champion_alias("sp50"): 2
    }  # fmt: skip


def test_two_writers_take_different_numbers(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one enters its decision between this one's look and its write."""
    level = register()
    candidate = Candidate(model_name="m", version=7, level=LEVEL, alias=ALIAS, from_version=None)
    read, others = RunHistory.read, iter([yes("other", "rejected")])

    def raced(history: RunHistory) -> Any:
        entries = read(history)
        if decision := next(others, None):
            RunHistory(open_store(level.store.uri)).append(decision, candidate)
        return entries

    monkeypatch.setattr(RunHistory, "read", raced)
    entry = level.history.append(yes("mine"), candidate)
    monkeypatch.undo()
    assert [e.decision.key for e in level.history.read()] == ["other", "mine"]
    assert entry.number == 2


def rewrite(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_bytes()) | changes
    path.write_bytes((json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode())


def _client(level: Promotable) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(level.registry._uri, level.registry._uri)


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (lambda level: rewrite(entry_file(level, 1), by="eve"), "does not follow from what lies before it"),
        (lambda level: rewrite(entry_file(level, 3), by="eve"), "is not the one in the registry"),
        (lambda level: entry_file(level, 2).unlink(), "lacks history/0002.json"),
        (lambda level: entry_file(level, 3).unlink(), "entry 3 is in the registry and was removed"),
        (lambda level: entry_file(level, 1).write_text("{}"), "no entry of a history"),
        (lambda level: entry_file(level, 2).write_bytes(entry_file(level, 2).read_bytes() + b" "), "was edited"),
        (
            lambda level: level.registry.set_alias(level.version.name, ALIAS, 1),
            "champion-sp37_5 points to version 1, and no entry says so",
        ),
        (
            lambda level: _client(level).delete_registered_model_alias(level.version.name, ALIAS),
            "champion-sp37_5 is gone, and version 2 was made champion last",
        ),
    ],
    ids=["first", "last", "gap", "cut off", "emptied", "reformatted", "alias", "no alias"],
)
def test_tampering_shows(register: Register, tamper: Callable[[Promotable], object], expected: str) -> None:
    register()
    level = register()
    for number, action in enumerate(("requested", "rejected", "promoted")):
        decide(fresh(level), yes(f"key {number}", action))
    assert champions.history(level.registry, level.version.name)["problems"] == []
    tamper(level)
    (problem,) = champions.history(level.registry, level.version.name)["problems"]
    assert expected in problem


def test_another_manifest_breaks_the_chain(register: Register) -> None:
    level = register()
    decide(level, yes("one"))
    Path(level.store.uri.removeprefix("file://"), "manifest.json").write_text("another")
    with pytest.raises(IntegrityError, match="does not follow"):
        level.history.read()


def test_the_state_of_a_version(register: Register) -> None:
    level, other = register(), register()

    def state() -> str | None:
        return promotion_state(fresh(level).version, level.registry.aliases(level.version.name))

    assert state() is None
    states = {
        "requested": "awaiting approval",
        "timed_out": "timed out",
        "rejected": "rejected",
        "promoted": "champion",
    }
    for action, expected in states.items():
        decide(fresh(level), yes(action, action))
        assert state() == expected
    decide(other, yes("other"))
    assert state() == "former champion"


# The commands


def run(tracking_uri: str, *arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--tracking-uri", tracking_uri])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout) if "--json" in arguments and status != 2 else result.output


def test_approve_and_roll_back_and_read_it_all(register: Register, tracking_uri: str, model_name: str) -> None:
    for _ in range(3):
        register()
    for version in ("1", "2", "3", "3"):
        done = run(tracking_uri, "approve", model_name, version, "--reason", f"try {version}", "--by", "ana", "--json")
    assert (done["champion"], done["from_version"]) == (3, 2)
    back = run(tracking_uri, "rollback", model_name, LEVEL, "--reason", "worse  on\nours", "--json")
    assert (back["champion"], back["from_version"], back["action"]) == (2, 3, "rolled_back")
    # Not to 3 again: before version 2 was promoted, 1 served.
    assert run(tracking_uri, "rollback", model_name, LEVEL, "--reason", "still", "--json")["champion"] == 1
    assert "no champion before version 1" in run(
        tracking_uri, "rollback", model_name, LEVEL, "--reason", "again", status=2
    )
    to = ("rollback", model_name, LEVEL, "--to", "3", "--reason", "it was not the model", "--by", "ben", "--json")
    assert run(tracking_uri, *to) == run(tracking_uri, *to)
    found = run(tracking_uri, "history", model_name, "--json")
    assert found["champions"] == {ALIAS: 3}
    assert [version["state"] for version in found["versions"]] == ["former champion", "former champion", "champion"]
    assert [(e["action"], e["from_version"], e["version"], e["by"], e["reason"]) for e in found["events"]] == [
        ("rolled_back", 1, 3, "ben", "it was not the model"),
        ("rolled_back", 2, 1, getpass.getuser(), "still"),
        ("rolled_back", 3, 2, getpass.getuser(), "worse on ours"),
        ("promoted", 2, 3, "ana", "try 3"),
        ("promoted", 1, 2, "ana", "try 2"),
        ("promoted", None, 1, "ana", "try 1"),
    ]
    table = run(tracking_uri, "history", model_name)
    assert "rolled back" in table
    assert "former champion" in table


def test_a_run_that_is_repeated_does_not_undo_a_rollback(register: Register, model_name: str) -> None:
    """A gate's verdict has the same key whenever its run is repeated."""
    good, bad = register(), register()
    decide(good, yes("gate of the first"))
    decide(bad, yes("gate of the second"))
    champions.roll_back(bad.registry, model_name, LEVEL, by="ana", reason="worse")
    decide(fresh(bad), yes("gate of the second"))
    assert bad.champion() == good.version.version
    assert champions.history(bad.registry, model_name)["problems"] == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_rollback_that_was_interrupted_is_not_made_twice(
    register: Register, model_name: str, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    for number in range(3):
        decide(register(), yes(str(number)))
    registry = register().registry
    owner = RunHistory if call == "append" else MlflowRegistry
    whole = getattr(owner, call)

    def dies(*arguments: Any) -> None:
        if after:
            whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, dies)
        with pytest.raises(KeyboardInterrupt):
            champions.roll_back(registry, model_name, LEVEL, by="ana", reason="worse")
    if (call, after) == ("tag", True):
        return  # nothing was left to do: the next command is another rollback
    assert champions.roll_back(registry, model_name, LEVEL, by="ana", reason="worse")["champion"] == 2
    found = champions.history(registry, model_name)
    assert [event["action"] for event in found["events"]].count("rolled_back") == 1
    assert found["problems"] == []


def test_only_named_approvers_approve(register: Register, tracking_uri: str, model_name: str) -> None:
    level = register()
    asked = Decision(action="requested", key="r", at="2026", by="recipe", via="recipe", approvers=("ana", "ben"))
    decide(level, asked)
    command = ("approve", model_name, "1", "--reason", "good", "--by")
    assert "whose recipe names as approvers: ana, ben" in run(tracking_uri, *command, "eve", status=2)
    assert level.champion() is None
    assert "champion-sp37_5" in run(tracking_uri, *command, "ben")
    assert level.champion() == 1


def test_what_is_asked_in_vain(register: Register, tracking_uri: str, model_name: str) -> None:
    register()
    register(gate_passed=False)
    for expected, *arguments in (
        ("there are 1, 2", "approve", model_name, "3", "--reason", "x"),
        ("gate=failed", "approve", model_name, "2", "--reason", "x"),
        ("1 to 500 are kept", "approve", model_name, "1", "--reason", " "),
        ("1 to 500 are kept", "approve", model_name, "1", "--reason", "x" * 501),
        ("has no champion", "rollback", model_name, LEVEL, "--reason", "x"),
        ("no level of that name", "history", "nobody"),
    ):
        assert expected in " ".join(run(tracking_uri, *arguments, status=2).split())
    run(tracking_uri, "approve", model_name, "1", "--reason", "x")
    refused = run(tracking_uri, "rollback", model_name, LEVEL, "--to", "2", "--reason", "x", status=2)
    assert "it never was" in " ".join(refused.split())


def test_history_of_a_damaged_chain_ends_with_1(register: Register, tracking_uri: str, model_name: str) -> None:
    level = register()
    decide(level, yes("one"))
    entry_file(level, 1).unlink()
    found = run(tracking_uri, "history", model_name, "--json", status=1)
    assert [event["by"] for event in found["events"]] == ["ana"]
    assert len(found["problems"]) == 1
