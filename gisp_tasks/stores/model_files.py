"""What a model directory may hold: a directory of unknown origin can neither run code nor reach other files.

Files of a model are read, digested, recorded and partly copied into published checkpoints. So a link or a name in an
index that leads out of the directory would publish what lies there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gisp_tasks.errors import InputError

INDEX = "model.safetensors.index.json"
_CODE_FORMATS = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib"})
_SHARD = re.compile(r"^[\w.-]+\.safetensors$")


def check_model_files(directory: Path, config: Mapping[str, Any], *, source: str, trust_remote_code: bool) -> None:
    """Refuse a model directory that could run code or reach outside.

    Args:
        directory: the model, complete on this machine.
        config: its config.json.
        source: its name in messages.
        trust_remote_code: the recipe allows Python code that the model ships.

    Raises:
        InputError: there is no .safetensors file; a file is a link that leaves the directory; the index names a file
            that is not right there; or there is code that is not allowed, or not part of the model.
    """
    _check_links(directory, source)
    _check_weights(directory, source)
    _check_code(config, source, trust_remote_code)


def _check_links(directory: Path, source: str) -> None:
    """Links within the model are allowed, and those of the hub's cache (snapshots/COMMIT/f -> blobs/DIGEST)."""
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise InputError(
                f"model {source}: {path.relative_to(directory)} was found to be a link that leaves the directory; only "
                f"files below it are read, because they are published with the model; replace the link by the file"
            )


def _check_weights(directory: Path, source: str) -> None:
    if not any(directory.glob("*.safetensors")):
        others = sorted(path.name for path in directory.iterdir() if path.suffix in _CODE_FORMATS)
        raise InputError(
            f"model {source}: no .safetensors file was found ({', '.join(others) or 'no weights at all'}); "
            f"only safetensors are read, because other formats can run code; convert the weights"
        )
    for name in _indexed(directory / INDEX, source):
        if not (isinstance(name, str) and _SHARD.match(name) and (directory / name).is_file()):
            raise InputError(
                f"model {source}: {INDEX} names the weights {str(name)[:80]!r}, which is no .safetensors file right in "
                f"the directory; only such names are allowed; give a complete model"
            )


def _indexed(index: Path, source: str) -> Iterator[Any]:
    if not index.is_file():
        return
    try:
        yield from set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"model {source}: {INDEX} was read, and is no index of tensors ({type(error).__name__}); a mapping "
            f"`weight_map` of tensor to file is allowed; give a complete model"
        ) from None


def _check_code(config: Mapping[str, Any], source: str, trust_remote_code: bool) -> None:
    if "auto_map" not in config:
        return
    if not trust_remote_code:
        raise InputError(
            f"model {source}: it ships Python code of its own (auto_map in config.json), which is not run "
            f"unless the recipe allows it; read that code, then set model.trust_remote_code: true"
        )
    if "--" in json.dumps(config["auto_map"]):  # REPOSITORY--module.Class
        raise InputError(
            f"model {source}: auto_map in its config.json names code of another repository, which is not part of the "
            f"model and has no digest in the record; only code beside the weights is allowed; copy it there"
        )
