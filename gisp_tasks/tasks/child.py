"""Heavy work in a process of its own.

A task's process must keep its heartbeat, must be able to kill the work, and must not hand a CUDA context to a
fork. So functions that load a model run as ``python -m gisp_tasks.tasks.child``: arguments go in as JSON, the
result or the error comes back as JSON, and everything the child prints is logged line by line. The child ends
when its parent does, however the parent ends: its standard input closes.
"""

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from gisp_tasks import errors

logger = logging.getLogger(__name__)


def run_in_child(function: str, **arguments: Any) -> Any:
    """Call ``module:function`` in a new process and return its JSON-ready result.

    Raises:
        GispError: what the function raised, as the same type.
        RetryableError: the process died, for instance by a signal.
    """
    with tempfile.TemporaryDirectory(prefix="gisp-") as directory:
        result_file = Path(directory) / "result.json"
        command = [sys.executable, "-m", "gisp_tasks.tasks.child", function, str(result_file)]
        with subprocess.Popen(  # noqa: S603 - our own module, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": directory},
        ) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(arguments) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    logger.info("%s", line.rstrip())
            except BaseException:
                process.kill()
                raise
        if not result_file.exists():
            raise errors.RetryableError(
                f"the process of {function} ended with status {process.returncode} and no result"
            )
        return _unwrap(json.loads(result_file.read_text()))


def _unwrap(outcome: dict[str, Any]) -> Any:
    if "result" in outcome:
        return outcome["result"]
    kind = getattr(errors, outcome["error"], RuntimeError)
    raise kind(outcome["message"])


def main() -> None:
    """Entry point of the child."""
    function, result_file = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    _quiet_libraries()
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module_name, _, name = function.partition(":")
    try:
        outcome = {"result": getattr(importlib.import_module(module_name), name)(**arguments)}
    except errors.GispError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": type(error).__name__, "message": f"{type(error).__name__}: {error}"}
    partial = result_file.with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    partial.replace(result_file)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _quiet_libraries() -> None:
    """Progress bars and chatter of libraries belong to terminals, not to task logs."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("httpx", "urllib3", "botocore", "filelock", "datasets", "lm_eval", "lm-eval", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
    # Threads of native libraries may not end: the result is written, so the process may.
    sys.stdout.flush()
    os._exit(0)
