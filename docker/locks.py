"""Writes the images' locks: the part of requirements.lock that each image installs (python docker/locks.py [--check]).

An image's lock is the closure of its roots over what the packages in this environment require, at the versions of
requirements.lock. Nothing is resolved anew, so an image never has a version that the tests have not seen.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HERE = ROOT / "docker"
# What only a task's own process needs: it loads models or reads data sets.
HEAVY = frozenset({"accelerate", "datasets", "gguf", "lm-eval", "torch", "transformers"})


def locked() -> dict[str, str]:
    """Package -> its line of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def closure(roots: list[Requirement], known: dict[str, str]) -> list[str]:
    """The lines of the roots and of everything that they require here, sorted."""
    found: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in _requires(name):
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                child = canonicalize_name(wanted.name)
                todo += [(child, each) for each in ("", *wanted.extras)]
    return sorted({known[name] for name, _ in found})


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here; run `make setup` first") from None


def locks() -> dict[str, str]:
    """File name -> its content."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [Requirement(text) for text in project["dependencies"]]
    signing = [Requirement(text) for text in project["optional-dependencies"]["signing"]]
    light = [root for root in roots if canonicalize_name(root.name) not in HEAVY]
    known = locked()
    head = "# The part of requirements.lock that {} installs. Made by `make images-lock`; do not edit.\n"
    return {
        "worker.lock": head.format("worker.Dockerfile") + "\n".join(closure(roots + signing, known)) + "\n",
        "airflow.lock": head.format("airflow.Dockerfile") + "\n".join(closure(light, known)) + "\n",
    }


def main() -> None:
    """Write them, or with --check say which are out of date."""
    stale = [name for name, text in locks().items() if _read(HERE / name) != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: out of date; run `make images-lock`" if stale else 0)
    for name, text in locks().items():
        (HERE / name).write_text(text)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    main()
