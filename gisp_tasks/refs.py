"""What travels between tasks: the address, digest and size of an artefact, never its bytes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ArtifactRef:
    """One published artefact.

    Args:
        uri: where it lies (``s3://…`` or ``file://…``).
        sha256: hex digest of its bytes; for a directory, of its canonical listing (`DirectoryListing`).
        size: bytes; for a directory, of all its files together.
    """

    uri: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary (the form that an XCom holds)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ArtifactRef":
        """The inverse of `to_dict`."""
        return cls(uri=value["uri"], sha256=value["sha256"], size=value["size"])


@dataclass(frozen=True)
class DirectoryListing:
    """The files of a directory: relative name -> (sha256, size). Published last, it marks it complete."""

    files: Mapping[str, tuple[str, int]]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for _, size in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON: the digest of these bytes is the digest of the directory."""
        return canonical_json({name: {"sha256": sha, "size": size} for name, (sha, size) in self.files.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "DirectoryListing":
        """The inverse of `to_bytes`."""
        return cls({name: (entry["sha256"], entry["size"]) for name, entry in json.loads(data).items()})

    @classmethod
    def of(cls, directory: Path) -> "DirectoryListing":
        """Digest every regular file below ``directory``; names are relative, with forward slashes."""
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return cls({p.relative_to(directory).as_posix(): (sha256_file(p), p.stat().st_size) for p in files})


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and a final newline: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces of one MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
