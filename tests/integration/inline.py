"""`gisp` with its tasks in its own process: a child process becomes a call.

For tests to which processes do not matter: each would import torch again, which takes longer than what it computes.
"""

import importlib
import json
from typing import Any


def call(function: str, **arguments: Any) -> Any:
    """Stands in for `gisp_tasks.tasks.child.run_in_child`: what goes in and comes out is JSON all the same."""
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(json.dumps(arguments)))
    return json.loads(json.dumps(result))


if __name__ == "__main__":
    from gisp_tasks import cli
    from gisp_tasks.tasks import child

    child.run_in_child = call
    cli.main()
