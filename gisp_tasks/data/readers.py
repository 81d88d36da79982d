"""Rows out of one local file: Parquet, JSON lines (also gzipped) and plain text."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gisp_tasks.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in its order; a ``.txt`` file is one row with the key ``text``.

    Raises:
        InputError: no such file, a format that is not known, or bytes that are not what the name says.
    """
    reader = _READERS[_format(path)]
    with _readable(path):
        return reader(path)


def read_numbered_lines(path: Path) -> list[tuple[int, Row]]:
    """The objects of a JSON-lines file with their line numbers, from 1; blank lines are passed over.

    Raises:
        InputError: no such file, not JSON lines, or as in `read_rows`.
    """
    if ".json" not in _format(path):
        raise InputError(f"data file {path}: JSON lines were expected. Allowed is .jsonl; convert the file to it")
    with _readable(path):
        return list(_numbered_objects(path))


def count_rows(path: Path) -> int:
    """How many rows `read_rows` returns, without building them.

    Raises:
        InputError: as in `read_rows`, but the content of JSON lines is not looked at.
    """
    kind = _format(path)
    with _readable(path):
        if kind == ".parquet":
            from pyarrow import parquet

            return int(parquet.read_metadata(path).num_rows)
        if kind == ".txt":
            return 1
        with _open_lines(path) as lines:
            return sum(1 for line in lines if line.strip())


def _format(path: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"data file {path}: no such file. Allowed is a file ending in {_ALLOWED}; give the path of one, "
            f"as this machine sees it"
        )
    kind = next((suffix for suffix in _READERS if path.name.endswith(suffix)), None)
    if kind is None:
        raise InputError(f"data file {path}: unknown kind {path.suffix!r}. Allowed are {_ALLOWED}; convert it to one")
    return kind


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the readers raise into one message that names the file."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ArrowException) as error:
        raise InputError(
            f"data file {path}: not readable as {''.join(path.suffixes[-2:])} ({type(error).__name__}: {error}). "
            f"Allowed are {_ALLOWED}, text in UTF-8; write the file again"
        ) from error


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    return [row for _, row in _numbered_objects(path)]


def _numbered_objects(path: Path) -> Iterator[tuple[int, Row]]:
    with _open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_object(path, number, line)


def _json_object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"data file {path}, line {number}: not JSON ({error.msg}); write one object a line") from None
    if not isinstance(row, dict):
        raise InputError(
            f"data file {path}, line {number}: a JSON object was expected, found {type(row).__name__}; "
            f'write {{"name": value, …}} a line'
        )
    return row


def _read_text(path: Path) -> list[Row]:
    return [{"text": path.read_text(encoding="utf-8")}]


def _open_lines(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json.gz": _read_json_lines,
    ".txt": _read_text,
}
_ALLOWED = ", ".join(_READERS)
