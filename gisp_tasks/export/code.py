"""Which code a checkpoint may bring along when nobody allowed any: only this package's own, byte for byte."""

import json
from importlib import resources
from pathlib import Path

from gisp_tasks.errors import InputError

_MODELING = "gisp_tasks.export.modeling"


def may_run_code(checkpoint: Path, *, allowed: bool) -> bool:
    """Whether transformers may run code that a checkpoint carries.

    Args:
        checkpoint: a Hugging Face directory.
        allowed: its user read the code and allows it.

    Raises:
        InputError: it asks for code that is not this package's, and ``allowed`` is not set.
    """
    if allowed:
        return True
    maps = [found for path in sorted(checkpoint.glob("*.json")) if (found := _auto_map(path))]
    if not maps:
        return False
    own = {path.name: path.read_bytes() for path in resources.files(_MODELING).iterdir() if path.name.endswith(".py")}
    foreign = [path.name for path in sorted(checkpoint.rglob("*.py")) if path.read_bytes() != own.get(path.name)]
    foreign += [found for found in maps if "--" in found]  # REPOSITORY--module.Class
    if foreign:
        raise InputError(
            f"{checkpoint}: it carries or names code that is not this package's ({foreign[0]}), which is not run "
            f"unless you allow it; read that code, then give --trust-remote-code"
        )
    return True


def _auto_map(path: Path) -> str | None:
    """The ``auto_map`` of a configuration, as text; None where it has none."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None  # whoever needs the file says what is wrong with it
    found = document.get("auto_map") if isinstance(document, dict) else None
    return json.dumps(found) if found else None
