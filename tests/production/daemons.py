"""Servers of the topology as processes that can be killed and started again."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gisp_tasks.errors import PermanentError

START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0
MARK = "GISP_TOPOLOGY"
"""A variable in the environment of every process of a topology."""


class Daemon:
    """One server.

    Args:
        name: of its log.
        command: what runs.
        directory: for the log; also its working directory.
        environment: added to this process's own.
        answers: whether it is ready; None: not waited for.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        directory: Path,
        environment: Mapping[str, str],
        answers: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._directory = directory
        self._environment = environment
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self._directory / f"{self.name}.log"

    def start(self, *, wait: bool = True) -> None:
        """Start it as the leader of a process group."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                cwd=self._directory,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            PermanentError: it ended, or does not answer.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._answers is not None and not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-3000:]
                raise PermanentError(f"{self.name} did not start; {self.log} ends with:\n{tail}")
            time.sleep(0.25)

    def kill(self) -> None:
        """Kill -9, with all that it started: what a machine does that loses its power."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, then make it; again is harmless."""
        self._end(signal.SIGTERM)
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        family = []
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self._process.pid)
            family = [leader, *leader.children(recursive=True)]
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        for process in family if number == signal.SIGKILL else ():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_TIMEOUT_S)
        psutil.wait_procs(family[1:], timeout=_STOP_TIMEOUT_S)


def http_answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def processes_of(mark: str, *, running: str) -> list[psutil.Process]:
    """The processes of a topology whose command line contains ``running``."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if running in " ".join(process.cmdline()) and process.environ().get(MARK) == mark:
                found.append(process)
    return found
