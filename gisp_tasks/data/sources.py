"""Where rows come from: a mirror directory, the Hugging Face hub at a pinned revision, what is embedded, or a file.

`find` looks in the mirror that the environment variable ``GISP_DATA_ROOT`` names (``<dataset>/<split>.parquet``),
then on the hub. The embedded data sets need neither. Whatever is found says so, with its digests, in `describe`.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gisp_tasks.cache import cache_directory
from gisp_tasks.data import embedded, hub
from gisp_tasks.data.readers import Row, count_rows, read_rows
from gisp_tasks.errors import InputError
from gisp_tasks.refs import sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "GISP_DATA_ROOT"
_PART_MARKS = ("first_half", "partial")
Origin = Literal["mirror", "hub", "embedded", "file"]


@dataclass(frozen=True)
class SourceFile:
    """One file of rows.

    Args:
        name: relative to the mirror or the hub repository; for one's own file, its last part.
        sha256: hex digest of its bytes.
        size: bytes.
        path: where it lies on this machine; never part of a record.
    """

    name: str
    sha256: str
    size: int
    path: Path

    @classmethod
    def of(cls, path: Path, name: str) -> "SourceFile":
        """Digest a file that exists."""
        return cls(name, sha256_file(path), path.stat().st_size, path)

    def describe(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the local path."""
        return {"name": self.name, "sha256": self.sha256, "size": self.size}


@dataclass(frozen=True)
class Source:
    """The rows of one split, and where they came from.

    Args:
        dataset: the name asked for.
        split: the split found; a part of one names itself, e.g. ``test_first_half``.
        origin: the place it was found in.
        revision: hub commit; None elsewhere.
        files: in the order of their rows.
    """

    dataset: str
    split: str
    origin: Origin
    revision: str | None
    files: tuple[SourceFile, ...]

    @property
    def digest(self) -> str:
        """Hex sha256 over the digests of the files, in their order."""
        return sha256_bytes("\n".join(file.sha256 for file in self.files).encode())

    def rows(self) -> list[Row]:
        """All rows.

        Raises:
            InputError: a file is not readable as what its name says.
        """
        return [row for file in self.files for row in read_rows(file.path)]

    def texts(self) -> list[str]:
        """The field ``text`` of every row.

        Raises:
            InputError: a row has no such field, or it is not a string; or as in `rows`.
        """
        return [text for (text,) in self._fields("text")]

    def text(self) -> str:
        """All rows as one running text, a blank line between two (the usual form of WikiText-2).

        Raises:
            InputError: as in `texts`.
        """
        return "\n\n".join(self.texts())

    def items(self) -> list[tuple[str, str]]:
        """The fields ``question`` and ``answer`` of every row.

        Raises:
            InputError: as in `texts`.
        """
        return [(question, answer) for question, answer in self._fields("question", "answer")]

    def describe(self, num_rows: int | None = None) -> dict[str, Any]:
        """What a record keeps: JSON-ready, no local path.

        Args:
            num_rows: when the caller knows it; by default it is counted.
        """
        description = {
            "dataset": self.dataset,
            "split": self.split,
            "origin": self.origin,
            "revision": self.revision,
            "digest": self.digest,
            "files": [file.describe() for file in self.files],
            "rows": sum(count_rows(file.path) for file in self.files) if num_rows is None else num_rows,
        }
        if self.origin == "hub":
            description["repository"] = hub.DATASETS[self.dataset].repository
        return description

    def _fields(self, *names: str) -> Iterator[tuple[str, ...]]:
        for number, row in enumerate(self.rows(), start=1):
            values: tuple[Any, ...] = tuple(row.get(name) for name in names)
            if not all(isinstance(value, str) for value in values):
                found = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items()) or "no field"
                raise InputError(
                    f"{self.files[0].name}, row {number}: string fields {', '.join(names)} were expected, found "
                    f"{found}. Every row needs them; rename the column or remove the row"
                )
            yield values


def describe_together(dataset: str, found: Mapping[str, Source], split: str) -> dict[str, Any]:
    """One record of the sources of several tasks, as `Source.describe`; each one's own is under ``tasks``.

    Args:
        dataset: name of the whole.
        found: task -> its source.
        split: the one asked for; a task's that is not quite it is named with the task.
    """
    others = ", ".join(f"{task}: {source.split}" for task, source in found.items() if source.split != split)
    revisions = dict.fromkeys(source.revision for source in found.values() if source.revision)
    tasks = {task: source.describe() for task, source in found.items()}
    return {
        "dataset": dataset,
        "split": f"{split} ({others})" if others else split,
        "origin": ", ".join(dict.fromkeys(source.origin for source in found.values())),
        "revision": ", ".join(revisions) or None,
        "digest": sha256_bytes("\n".join(source.digest for source in found.values()).encode()),
        "rows": sum(task["rows"] for task in tasks.values()),
        "tasks": tasks,
    }


def find(dataset: str, split: str) -> Source:
    """The rows of a named data set: from the mirror, else from the hub; embedded ones from this installation.

    Raises:
        InputError: unknown data set or split, a mirror that is no directory, or no mirror and no hub.
        RetryableError: the hub answered, and the download broke off.
    """
    if dataset in embedded.DATASETS:
        return _embedded(dataset, split)
    source = _mirrored(dataset, split) or _from_hub(dataset, split)
    logger.info("%s/%s: found %s (%s)", dataset, split, source.files[0].name, source.origin)
    return source


def from_file(path: Path) -> Source:
    """The rows of one's own file.

    Raises:
        InputError: no such file, or not one of the formats that `readers` knows.
    """
    count_rows(path)
    return Source("text", "all", "file", None, (SourceFile.of(path, path.name),))


def reachable(dataset: str, split: str) -> bool:
    """Whether `find` would succeed, without downloading the data.

    Raises:
        InputError: unknown data set or split, or a mirror that is no directory.
    """
    if dataset in embedded.DATASETS or _mirrored(dataset, split):
        return True
    return hub.reachable(_hub_dataset(dataset, split), split)


def _mirrored(dataset: str, split: str) -> Source | None:
    root = os.environ.get(MIRROR_VARIABLE)
    if not root:
        return None
    if not Path(root).is_dir():
        raise InputError(
            f"{MIRROR_VARIABLE}={root}: no such directory. It names a mirror with files <dataset>/<split>.parquet; "
            f"correct it, or unset it to use the Hugging Face hub"
        )
    for part in (dataset, split):
        if not re.fullmatch(r"\w[\w.-]*", part):
            raise InputError(
                f"data set {dataset!r}, split {split!r}: {part!r} cannot be a name in a mirror. "
                f"Allowed are letters, digits, '_', '-' and '.'; correct it"
            )
    for actual in (split, *(f"{split}_{mark}" for mark in _PART_MARKS)):
        name = f"{dataset}/{actual}.parquet"
        path = Path(root) / name
        if path.is_file():
            return Source(dataset, actual, "mirror", None, (SourceFile.of(path, name),))
    return None


def _from_hub(dataset: str, split: str) -> Source:
    known = _hub_dataset(dataset, split)
    file = SourceFile.of(hub.download(known, split), known.files[split])
    return Source(dataset, split, "hub", known.revision, (file,))


def _hub_dataset(dataset: str, split: str) -> hub.HubDataset:
    known = hub.DATASETS.get(dataset)
    if known is None:
        names = ", ".join([*hub.DATASETS, *embedded.DATASETS])
        raise InputError(
            f"data set {dataset!r}: unknown, and not in a mirror. Known are {names}; use one of them, or put "
            f"{dataset}/{split}.parquet into the directory that {MIRROR_VARIABLE} names"
        )
    _check_split(dataset, split, tuple(known.files))
    return known


def _check_split(dataset: str, split: str, allowed: tuple[str, ...]) -> None:
    if split not in allowed:
        raise InputError(f"data set {dataset}: no split {split!r}. It has {', '.join(allowed)}; use one of them")


def _embedded(dataset: str, split: str) -> Source:
    _check_split(dataset, split, embedded.SPLITS)
    data = _json_lines(embedded.DATASETS[dataset](split))
    file = SourceFile(embedded.file_name(dataset, split), sha256_bytes(data), len(data), _cached(data))
    return Source(dataset, split, "embedded", None, (file,))


def _cached(data: bytes) -> Path:
    """A file with these bytes in this package's cache directory, named by their digest."""
    cache = cache_directory() / "embedded"
    path = cache / f"{sha256_bytes(data)}.jsonl"
    try:
        if path.is_file() and path.read_bytes() == data:
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        raise InputError(
            f"embedded data: the cache directory {cache} cannot be written ({error.strerror}). "
            f"Set GISP_CACHE to a directory that can"
        ) from error
    return path


def _json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
