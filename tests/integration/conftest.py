"""The command line, as a user starts it or without the processes that a test is not about."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from gisp_tasks.cli import app

_INLINE = Path(__file__).with_name("inline.py")
_NOTHING: Mapping[str, str] = {}
Done = subprocess.CompletedProcess[str]


class CommandLine:
    """`gisp` in three ways; each asserts the exit status, and that no traceback was shown."""

    def start(self, *arguments: str, status: int = 0, environment: Mapping[str, str] = _NOTHING) -> Done:
        """As a user does: a new process, and one more for each task that loads a model."""
        return self._start(("-m", "gisp_tasks.cli", *arguments), status, environment)

    def start_inline(self, *arguments: str, status: int = 0, environment: Mapping[str, str] = _NOTHING) -> Done:
        """In one new process, with all tasks in it."""
        return self._start((str(_INLINE), *arguments), status, environment)

    def call(self, *arguments: str, status: int = 0, environment: Mapping[str, str] = _NOTHING) -> Done:
        """In this process, with all tasks in it.

        Not `run`, because Airflow reads its settings when it is first imported; nor with variables in ``environment``
        that another library reads then.
        """
        assert arguments[0] != "run" or "--help" in arguments
        in_place = runpy.run_path(str(_INLINE))["call"]
        with _torch_left_as_it_was(), mock.patch("gisp_tasks.tasks.prune_only.run_in_child", in_place):
            result = CliRunner().invoke(app, list(arguments), env=dict(environment))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return _checked(Done(arguments, result.exit_code, result.stdout, result.stderr), status)

    def _start(self, command: tuple[str, ...], status: int, environment: Mapping[str, str]) -> Done:
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=280,
        )
        return _checked(done, status)


def _checked(done: Done, status: int) -> Done:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


@contextmanager
def _torch_left_as_it_was() -> Iterator[None]:
    """One thread, as in the processes of the other ways: sums over more of them differ in the last bits."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def gisp() -> CommandLine:
    """The command line."""
    return CommandLine()


@pytest.fixture(scope="module")
def mirror_of_stories(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mirror whose "WikiText-2" is stories, which stories260K knows; `GISP_DATA_ROOT` names it."""
    root = tmp_path_factory.mktemp("mirror")
    (root / "wikitext2").mkdir()
    for split, stories in (("test", "validation"), ("train", "train")):
        (root / f"wikitext2/{split}.parquet").symlink_to(testdata / f"data/tinystories/{stories}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GISP_DATA_ROOT", str(root))
        yield root
