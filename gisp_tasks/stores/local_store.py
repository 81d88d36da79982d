"""The artefact store in a directory: ``file:///directory``."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

from gisp_tasks.errors import InputError, IntegrityError, StoreUnavailableError
from gisp_tasks.refs import sha256_file
from gisp_tasks.stores.artifacts import UPLOADING, Store, StoredObject, gone

_PASSING = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT}
)
"""What a network file system says while its server is away."""
_COPY_BYTES = 1 << 20


class LocalStore(Store):
    """Files below a directory, which is created by the first write.

    An artefact is written and synced under ``.uploading/``, then linked to its name; a link is made at once or,
    where the name is taken, not at all. What a killed writer leaves under ``.uploading/`` is never looked at.
    No digest is stored: `stat` computes it, so it tells what is there now.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._root = Path(unquote(uri.removeprefix("file://")))

    def _stat(self, key: str) -> tuple[str, int] | None:
        path = self._root / key
        with self._errors():
            return (sha256_file(path), path.stat().st_size) if path.is_file() else None

    def _create(self, key: str, source: Path | bytes, sha256: str) -> bool:
        path = self._root / key
        temporary = self._root / UPLOADING / uuid4().hex
        with self._errors():
            temporary.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if isinstance(source, bytes):
                    temporary.write_bytes(source)
                else:
                    shutil.copyfile(source, temporary)
                if sha256_file(temporary) != sha256:
                    raise IntegrityError(
                        f"{source!s} changed while it was published as {self.uri}/{key}. Publish it anew"
                    )
                _sync(temporary)
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync(path.parent)
        return True

    def _download(self, key: str, path: Path) -> None:
        with self._errors():
            source = self._existing(key).open("rb")
        with source, path.open("xb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def _read(self, key: str) -> bytes:
        with self._errors():
            return self._existing(key).read_bytes()

    def _delete(self, key: str) -> None:
        path = self._root / key
        with self._errors():
            path.unlink(missing_ok=True)
        with suppress(OSError):  # the first directory that holds something else, or is gone, ends this
            for parent in path.relative_to(self._root).parents[:-1]:
                (self._root / parent).rmdir()

    def _objects(self, prefix: str) -> Iterator[StoredObject]:
        with self._errors():
            found = [
                StoredObject(path.relative_to(self._root).as_posix(), path.stat().st_size, path.stat().st_mtime)
                for path in (self._root / prefix).rglob("*")
                if path.is_file()
            ]
        return (item for item in sorted(found) if not item.key.startswith(f"{UPLOADING}/"))

    def _existing(self, key: str) -> Path:
        path = self._root / key
        if not path.is_file():
            raise gone(f"{self.uri}/{key}")
        return path

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the operating system says into this package's errors."""
        try:
            yield
        except OSError as error:
            if error.errno in _PASSING:
                raise StoreUnavailableError(f"the store {self.uri} does not answer: {error.strerror}") from error
            raise InputError(
                f"{self.uri} was asked for as the store, and the system refuses: {error.strerror} ({error.filename}). "
                f"Allowed is a directory that this user may write, with space left, on a file system with hard "
                f"links. Correct publish.store, or the directory"
            ) from error


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
