"""The topology, started once; how often each fault is tried; and what is printed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from backends import PIPELINE
from topology import Outcome, Topology

_REPORT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-repeats", type=int, default=1, metavar="N", help="Try each fault N times (default 1).")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repeat" in metafunc.fixturenames:
        metafunc.parametrize("repeat", range(metafunc.config.getoption("fault_repeats")))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[_REPORT]:
        terminalreporter.section("production topology")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def note(request: pytest.FixtureRequest):
    """Adds a line to the closing report."""

    def add(line: str) -> None:
        request.config.stash[_REPORT].append(line)
        print(line)

    return add


@pytest.fixture(scope="session")
def topology(testdata: Path) -> Iterator[Topology]:
    """Everything started, each server with a log in one directory; that is kept when GISP_KEEP names it."""
    missing = [name for name in ("redis-server", "pg_ctl") if not _installed(name)]
    if missing:
        pytest.exit(f"{' and '.join(missing)} not found: apt-get install postgresql redis-server", returncode=4)
    kept = os.environ.get("GISP_KEEP")
    directory = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="gisp-production-"))
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name in [name for name in os.environ if name.startswith(("AIRFLOW", "AWS_", "MLFLOW_", "GISP_R"))]:
            patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_USERNAME", PIPELINE[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PIPELINE[1])
        if not kept:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        yield Topology(directory, testdata / "models" / "stories260K", stack)


@pytest.fixture(scope="session")
def undisturbed(topology: Topology) -> Outcome:
    """The run that all others are compared with."""
    with topology.run() as attempt:
        return attempt.outcome()


def _installed(program: str) -> bool:
    return shutil.which(program) is not None or any(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
