"""A run that is killed at any moment, and started again, ends in the same bytes and repeats at most one step."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gisp_tasks.refs import DirectoryListing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4
MOMENTS = 10
_SEED = 20
_COMPARED = re.compile(
    r"removal_order\.safetensors|steps/\d+/(scores|removal_order)\.safetensors|calibration/.*"
    r"|levels/[^/]+/(model/.*|level\.json|evaluation\.json)|plan\.json"
)
_SCORED = re.compile(r"Step (\d+): objective")


@dataclass(frozen=True)
class Attempt:
    """One invocation of `gisp run`, in a process group of its own, with its own log.

    Args:
        process: leader of the group.
        cache: holds the log.
        store: where it publishes.
    """

    process: subprocess.Popen[str]
    cache: Path
    store: Path

    def summary(self) -> dict[str, Any]:
        """Wait for its end, and return what it printed."""
        stdout, stderr = self.process.communicate(timeout=500)
        assert self.process.returncode == 0, stderr
        summary: dict[str, Any] = json.loads(stdout)
        return summary

    def kill_group_after(self, seconds: float) -> None:
        """Kill -9 the command with every process that it has started by then."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def scored_steps(self) -> set[int]:
        """The steps whose scoring pass its log reports."""
        logs = [path.read_text(errors="replace") for path in (self.cache / "logs").glob("*.log")]
        return {int(number) for log in logs for number in _SCORED.findall(log)}


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Args:
        recipe: its file.
        database: an empty Airflow database, so that no other run has to make one.
        seconds: how long it took.
        manifest_sha256: of its manifest, less who triggered the run.
        files: what it published, less timings and what shows them.
    """

    recipe: Path
    database: Path
    seconds: float
    manifest_sha256: str
    files: dict[str, tuple[str, int]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, testdata: Path) -> Reference:
    directory = tmp_path_factory.mktemp("reference")
    recipe = directory / "recipe.yaml"
    value = {
        "name": "killed",
        "model": {"source": str(testdata / "models" / "stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.2, 0.4], "steps": STEPS},
        "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
        "publish": {"store": "file:///replaced", "gate": {"max_perplexity_ratio": 50}},
    }
    recipe.write_text(yaml.safe_dump(value))
    # The first command on a machine makes an empty Airflow database: no part of the time that the kills divide.
    refused = _start(recipe, directory / "cache-1", directory / "store", options=("--resume",))
    refused.process.communicate(timeout=300)
    assert refused.process.returncode == 2
    database = next((directory / "cache-1").glob("airflow-*.db"))
    began = time.monotonic()
    attempt = _start(recipe, directory / "cache-2", directory / "store", database)
    summary = attempt.summary()
    seconds = time.monotonic() - began
    assert attempt.scored_steps() == set(range(1, STEPS + 1))
    return Reference(recipe, database, seconds, summary["manifest_sha256"], _published(attempt.store))


def _moments() -> Iterator[float]:
    """One moment in each tenth of a run, as fractions of its duration."""
    generator = random.Random(_SEED)
    return ((number + generator.random()) / MOMENTS for number in range(MOMENTS))


@pytest.mark.parametrize("fraction", _moments(), ids=lambda fraction: f"{100 * fraction:.0f}%")
def test_killed_and_started_again(reference: Reference, tmp_path: Path, fraction: float) -> None:
    store = tmp_path / "store"
    first = _start(reference.recipe, tmp_path / "cache-1", store, reference.database)
    first.kill_group_after(fraction * reference.seconds)
    if first.process.returncode == 0:
        pytest.skip("this machine was faster than the reference run: it had ended before its moment")
    assert first.process.returncode == -signal.SIGKILL
    _wait_for_the_end_of_group(first.process.pid)
    before = _mtimes(store)
    scored_before = {int(name.split("/")[-2]) for name in before if name.endswith("/scores.safetensors")}

    second = _start(reference.recipe, tmp_path / "cache-2", store, reference.database)
    summary = second.summary()

    assert summary["manifest_sha256"] == reference.manifest_sha256
    assert _published(store) == reference.files
    after = _mtimes(store)
    assert {name: after.get(name) for name in before} == before, "a published file was written again"
    assert second.scored_steps() == set(range(1, STEPS + 1)) - scored_before
    repeated = first.scored_steps() & second.scored_steps()
    assert len(repeated) <= 1
    print(f"killed after {fraction * reference.seconds:.1f} s of {reference.seconds:.1f} s: ", end="")
    print(f"{len(before)} of {len(after)} files were published, {len(scored_before)} of {STEPS} steps scored, ", end="")
    print(f"{len(repeated)} repeated")


def _start(
    recipe: Path, cache: Path, store: Path, database: Path | None = None, options: tuple[str, ...] = ()
) -> Attempt:
    cache.mkdir()
    if database is not None:
        shutil.copy(database, cache / database.name)
    scratch = cache / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gisp_tasks.cli", "run", str(recipe), "--store", store.as_uri(), "--json", *options],
        env={**os.environ, "GISP_CACHE": str(cache), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Attempt(process, cache, store)


def _wait_for_the_end_of_group(group: int) -> None:
    """A signal to a group has been sent, not yet obeyed, when `os.killpg` returns."""
    deadline = time.monotonic() + 10
    while alive := [process for process in psutil.process_iter() if _runs_in(group, process)]:
        assert time.monotonic() < deadline, f"{alive} outlived kill -9"
        time.sleep(0.05)


def _runs_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _runs(store: Path) -> Path:
    return store / "runs"


def _published(store: Path) -> dict[str, tuple[str, int]]:
    """Digests of what must be the same in every store."""
    (prefix,) = _runs(store).iterdir()
    files = DirectoryListing.of(prefix).files
    return {name: entry for name, entry in files.items() if _COMPARED.fullmatch(name)}


def _mtimes(store: Path) -> dict[str, int]:
    """Published files by name; what a killed writer left in a directory whose name begins with a dot is none."""
    files = (path for path in _runs(store).rglob("*") if path.is_file())
    names = {path.relative_to(store).as_posix(): path.stat().st_mtime_ns for path in files}
    return {name: mtime for name, mtime in names.items() if not re.search(r"(^|/)\.", name)}
