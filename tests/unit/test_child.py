"""Work in a process of its own: what comes back, what is logged, and that it never outlives its parent."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gisp_tasks import errors
from gisp_tasks.tasks.child import run_in_child

_MODULE = """
import json
import os
import signal
import sys
import time

from gisp_tasks import errors


def echo(**arguments):
    return {"arguments": arguments, "pid": os.getpid()}


def fail(kind, message):
    raise getattr(errors, kind)(message)


def stumble():
    return {}["no such key"]


def speak():
    print("to stdout: größe")
    print("to stderr", file=sys.stderr)
    os.write(1, b"not text: \\xff\\n")


def die(number):
    os.kill(os.getpid(), number)


def leave(status):
    os._exit(status)


def sleep(pid_file):
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
"""

_PARENT = """
import sys
from gisp_tasks.tasks.child import run_in_child
run_in_child("work:sleep", pid_file=sys.argv[1])
"""

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GispError)]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `work` that children can import."""
    (tmp_path / "work.py").write_text(_MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_result_comes_back_from_another_process() -> None:
    arguments: dict[str, Any] = {"text": "größe\n", "number": 0.1, "nothing": None, "nested": {"list": [1, 2]}}
    result = run_in_child("work:echo", **arguments)
    assert result["arguments"] == arguments
    assert result["pid"] != os.getpid()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_the_same_class(kind: type[errors.GispError]) -> None:
    with pytest.raises(errors.GispError) as caught:
        run_in_child("work:fail", kind=kind.__name__, message="asked, found,\nallowed, to do")
    assert type(caught.value) is kind
    assert str(caught.value) == "asked, found,\nallowed, to do"


def test_any_other_exception_keeps_its_text_and_logs_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="KeyError: 'no such key'") as caught:
        run_in_child("work:stumble")
    # Neither branch: a scheduler tries it again as often as the recipe says, as it does any unforeseen error.
    assert not isinstance(caught.value, errors.GispError)
    assert "in stumble" in caplog.text


def test_what_it_prints_is_logged_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gisp_tasks.tasks.child"):
        run_in_child("work:speak")
    assert [record.getMessage() for record in caplog.records] == ["to stdout: größe", "to stderr", "not text: \ufffd"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_child_may_be_tried_again(number: signal.Signals) -> None:
    with pytest.raises(errors.RetryableError, match=f"work:die ended with status -{number:d} and no result"):
        run_in_child("work:die", number=int(number))


def test_a_child_that_leaves_without_a_result_may_be_tried_again() -> None:
    with pytest.raises(errors.RetryableError, match="ended with status 7 and no result"):
        run_in_child("work:leave", status=7)


def test_scratch_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(errors.RetryableError):
        run_in_child("work:die", number=int(signal.SIGKILL))
    run_in_child("work:echo")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    pid_file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(pid_file)]) as parent:
        try:
            _wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", seconds=30)
            child = psutil.Process(int(pid_file.read_text()))
            assert child.ppid() == parent.pid
        finally:
            parent.send_signal(number)
    _wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=5)


def _wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_peak_memory_is_the_process_s_own() -> None:
    held = bytearray(2**30)
    code = "from gisp_tasks.tasks.score import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 2**24 < int(done.stdout) < len(held)
