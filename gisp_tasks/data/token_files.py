"""Calibration sequences that come already tokenized: one integer array in a .npy or .safetensors file."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError

_ALLOWED = "one integer array [sequences, length >= 2] of token ids >= 0, in .npy or .safetensors"


def read(path: Path) -> NDArray[np.int64]:
    """The array of a token file, [sequences, length].

    Raises:
        InputError: no such file, not readable, more than one array, or not token ids.
    """
    if not path.is_file():
        raise _refusal(path, "no such file", "give the path of a file that this machine sees")
    arrays = _load(path)
    if len(arrays) != 1:
        names = ", ".join(sorted(arrays)) or "none"
        raise _refusal(path, f"{len(arrays)} arrays ({names})", "keep the tokens only")
    array = next(iter(arrays.values()))
    if array.dtype.kind not in "iu":
        raise _refusal(path, f"an array of type {array.dtype}", "convert it, e.g. to int32")
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise _refusal(path, f"an array of shape {list(array.shape)}", "reshape it")
    if array.min() < 0:
        raise _refusal(path, f"the negative id {array.min()}", "cut sequences to one length instead of padding them")
    return array.astype(np.int64)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {"array": np.lib.format.read_array(file, allow_pickle=False)}
        if path.suffix == ".safetensors":
            arrays: dict[str, NDArray[Any]] = load_file(path)
            return arrays
    except (OSError, ValueError, EOFError, TypeError, SafetensorError) as error:  # TypeError: bfloat16 and the like
        raise _refusal(path, f"bytes that do not read as {path.suffix} ({error})", "write it again") from error
    raise _refusal(path, f"the unknown kind {path.suffix!r}", "convert it")


def _refusal(path: Path, found: str, remedy: str) -> InputError:
    return InputError(f"calibration.path={path}: found {found}. Allowed is {_ALLOWED}; {remedy}")
