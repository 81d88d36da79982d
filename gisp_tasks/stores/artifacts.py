"""The artefact store: what was published once stays as it is, and what is read back is what was published.

An artefact has a key (relative, forward slashes) below the store's address. It appears under that key only when
complete, together with its SHA-256, and is never written again: publishing the same bytes twice sends them once,
publishing other bytes under a taken key is an `IntegrityError`. A directory is published file by file; its
listing ``KEY.json`` comes last and marks it complete.

``s3://bucket/prefix``: credentials and endpoint come from the environment, as for every AWS client.
``file:///directory``: for one machine, or machines that share a file system with hard links.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gisp_tasks.errors import InputError, IntegrityError, StoreUnavailableError
from gisp_tasks.recipe import EncryptionSection
from gisp_tasks.refs import ArtifactRef, DirectoryListing, sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

UPLOADING = ".uploading"
"""First part of no key: where a local store keeps what is not complete yet."""


def open_store(uri: str, *, encryption: EncryptionSection | None = None) -> "Store":
    """The store at an address; nothing is contacted yet (see `Store.check`).

    Args:
        uri: address of the store.
        encryption: what the server must encrypt objects with; S3 only.

    Raises:
        InputError: neither ``s3://bucket/prefix`` nor ``file:///directory``.
    """
    # Imported here because both are subclasses of `Store`.
    from gisp_tasks.stores.local_store import LocalStore
    from gisp_tasks.stores.s3_store import S3Store

    uri = uri.rstrip("/")
    if ".." not in uri.split("/"):
        if re.match(r"s3://[^/]+", uri):
            return S3Store(uri, encryption=encryption)
        if uri.startswith("file:///"):
            return LocalStore(uri)
    raise InputError(
        f"the store {uri!r} was asked for, which is no address of a store. Allowed are s3://bucket/prefix and "
        f"file:///absolute/directory, without '..'. Correct publish.store"
    )


@dataclass(frozen=True, order=True)
class StoredObject:
    """One object of a listing.

    Args:
        key: below the store's address.
        size: bytes.
        modified_s: when it was written, in seconds since 1970, by the server's clock.
    """

    key: str
    size: int
    modified_s: float


class Store(ABC):
    """Publishing and fetching of artefacts; what differs between kinds of store is in the abstract methods.

    Every method raises `StoreUnavailableError` when the store does not answer, and `InputError` when it refuses
    these credentials or permissions, or a key is not relative and free of '..'.

    Args:
        uri: address without a slash at its end.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def check(self) -> None:
        """Prove that this store can be written, read back and listed, and does not overwrite. Leaves no artefact.

        Raises:
            InputError: anything of this is refused.
            StoreUnavailableError: it does not answer, which is found out within seconds.
        """
        try:
            self._impatient()._probe()
        except StoreUnavailableError as error:
            raise StoreUnavailableError(
                f"{error}. A run needs a store that answers from the start. Start the server, or correct "
                f"AWS_ENDPOINT_URL_S3 or publish.store"
            ) from error

    def stat(self, key: str) -> ArtifactRef | None:
        """The published artefact, or None.

        Raises:
            IntegrityError: the object there was not published by this package: it carries no digest.
        """
        found = self._stat(_checked(key))
        return found and ArtifactRef(uri=self._uri(key), sha256=found[0], size=found[1])

    def put(self, key: str, path: Path) -> ArtifactRef:
        """Publish a file; nothing is sent when it is there already.

        Raises:
            IntegrityError: other bytes are published under this key.
        """
        return self._publish(key, path, sha256_file(path), path.stat().st_size)

    def put_bytes(self, key: str, data: bytes) -> ArtifactRef:
        """Publish bytes; as `put`."""
        return self._publish(key, data, sha256_bytes(data), len(data))

    def fetch(self, ref: ArtifactRef, path: Path) -> Path:
        """Write an artefact to a file, which appears only when complete and verified.

        Raises:
            IntegrityError: the artefact is gone, or its bytes are not those of ``ref``.
        """
        key = self.key_of(ref.uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            self._download(key, temporary)
            _compare(ref, sha256_file(temporary), temporary.stat().st_size)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def copy_out(self, key: str, path: Path) -> Path:
        """Write an object that others put there, of which no digest is known, to a file; whole or not at all.

        Raises:
            IntegrityError: there is none.
        """
        checked = _checked(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            self._download(checked, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def read(self, ref: ArtifactRef) -> bytes:
        """The bytes of an artefact; as `fetch`."""
        data = self._read(self.key_of(ref.uri))
        _compare(ref, sha256_bytes(data), len(data))
        return data

    def put_directory(self, key: str, directory: Path) -> ArtifactRef:
        """Publish every file below a directory under ``key/``, then its listing as ``key.json``.

        One that was interrupted goes on where it stopped; a complete one sends nothing.

        Raises:
            InputError: there is no file below ``directory``.
            IntegrityError: other bytes are published under one of the keys.
        """
        listing = DirectoryListing.of(directory)
        if not listing.files:
            raise InputError(
                f"{directory} was to be published as {key}, and holds no file. Give a directory with files"
            )
        if self.stat(f"{key}.json") is None:
            for name, (sha256, size) in listing.files.items():
                self._publish(f"{key}/{name}", directory / name, sha256, size)
        listing_ref = self.put_bytes(f"{key}.json", listing.to_bytes())
        return ArtifactRef(uri=f"{self._uri(key)}/", sha256=listing_ref.sha256, size=listing.size)

    def stat_directory(self, key: str) -> ArtifactRef | None:
        """The published directory; None until its listing, and so every file, is there."""
        found = self._listing(key)
        return found and found[0]

    def fetch_directory(self, ref: ArtifactRef, directory: Path) -> Path:
        """Write every file of a published directory below ``directory``; as `fetch`.

        Raises:
            IntegrityError: it is gone or incomplete, is not what ``ref`` says, or names a file outside.
        """
        key = self.key_of(ref.uri)
        found, listing = self._complete(key)
        _compare(ref, found.sha256, found.size)
        for name, (sha256, size) in listing.files.items():
            file_ref = ArtifactRef(uri=self._uri(f"{key}/{name}"), sha256=sha256, size=size)
            self.fetch(file_ref, directory / name)
        return directory

    def verify_directory(self, key: str) -> ArtifactRef:
        """The published directory, after its files were found there with the listed sizes and digests.

        On S3 the digests are those recorded on the objects: no file is read.

        Raises:
            IntegrityError: it is incomplete, or a file is not as listed.
        """
        found, listing = self._complete(key)
        for name, (sha256, size) in listing.files.items():
            expected = ArtifactRef(uri=self._uri(f"{key}/{name}"), sha256=sha256, size=size)
            actual = self.stat(f"{key}/{name}")
            if actual is None:
                raise gone(expected.uri)
            _compare(expected, actual.sha256, actual.size)
        return found

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys below ``prefix`` (whole parts: ``a`` has ``a/b``, not ``ab``), in order; by default all."""
        return (item.key for item in self.objects(prefix))

    def objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """As `keys`, with what a listing tells of each."""
        prefix = prefix.rstrip("/")
        return self._objects(f"{_checked(prefix)}/" if prefix else "")

    def delete(self, key: str) -> None:
        """Remove an artefact for good; one that is gone already is no error. For retention only: no task does this."""
        self._delete(_checked(key))

    def key_of(self, uri: str) -> str:
        """The key of an artefact's address.

        Raises:
            InputError: the address lies in another store.
        """
        if not uri.startswith(f"{self.uri}/"):
            raise InputError(
                f"{uri} was asked for, and the store at hand is {self.uri}. Allowed are addresses below it. "
                f"Give the store that the artefact was published to"
            )
        return _checked(uri[len(self.uri) + 1 :].removesuffix("/"))

    def _uri(self, key: str) -> str:
        return f"{self.uri}/{_checked(key)}"

    def _publish(self, key: str, source: Path | bytes, sha256: str, size: int) -> ArtifactRef:
        ref = ArtifactRef(uri=self._uri(key), sha256=sha256, size=size)
        found = self.stat(key)
        if found is None:
            if self._create(key, source, sha256):
                logger.info("%s: published, %d bytes", ref.uri, size)
                return ref
            found = self.stat(key)  # another writer was faster
        if found is None:
            raise StoreUnavailableError(f"{ref.uri}: its name was taken a moment ago, and is free now")
        if found != ref:
            raise IntegrityError(
                f"{ref.uri}: {size} bytes with sha256 {sha256} were to be published, and {found.size} bytes with "
                f"sha256 {found.sha256} are there. An artefact is never replaced. Use another store or prefix, or "
                f"remove the run that wrote it"
            )
        logger.info("%s: already published, nothing sent", ref.uri)
        return ref

    def _listing(self, key: str) -> tuple[ArtifactRef, DirectoryListing] | None:
        listing_ref = self.stat(f"{key}.json")
        if listing_ref is None:
            return None
        try:
            listing = DirectoryListing.from_bytes(self.read(listing_ref))
            for name in listing.files:
                _checked(f"{key}/{name}")
        except (ValueError, KeyError, TypeError, AttributeError, InputError):
            raise IntegrityError(f"{listing_ref.uri} is not the listing of a directory below {key}/") from None
        return ArtifactRef(uri=f"{self._uri(key)}/", sha256=listing_ref.sha256, size=listing.size), listing

    def _complete(self, key: str) -> tuple[ArtifactRef, DirectoryListing]:
        found = self._listing(key)
        if found is None:
            raise IntegrityError(f"{self._uri(key)}/ is incomplete: its listing {key}.json is not there")
        return found

    def _impatient(self) -> "Store":
        """The same store, one that gives up within seconds."""
        return self

    def _probe(self) -> None:
        directory = f".check-{uuid4().hex}"
        ref = ArtifactRef(uri=self._uri(f"{directory}/probe"), sha256=sha256_bytes(b"probe"), size=5)
        key = self.key_of(ref.uri)
        self._create(key, b"probe", ref.sha256)
        try:
            self.read(ref)
            if self.stat(key) != ref or list(self.keys(directory)) != [key]:
                raise InputError(f"{self.uri} was asked for as the store, and does not list what was written to it")
            if self._create(key, b"other", sha256_bytes(b"other")):
                raise InputError(
                    f"{self.uri} was asked for as the store, and its server overwrote an object in spite of "
                    f"If-None-Match. Allowed are servers with conditional writes. Use another one, or a newer version"
                )
        finally:
            try:
                self._delete(key)
            except InputError:
                logger.warning("%s: may be written and not deleted, so this check leaves %s behind", self.uri, key)

    @abstractmethod
    def _stat(self, key: str) -> tuple[str, int] | None:
        """SHA-256 and size of an object, or None."""

    @abstractmethod
    def _create(self, key: str, source: Path | bytes, sha256: str) -> bool:
        """Write an object whole, unless its name is taken; whether it was written."""

    @abstractmethod
    def _download(self, key: str, path: Path) -> None:
        """Write an object to a new file."""

    @abstractmethod
    def _read(self, key: str) -> bytes:
        """The bytes of an object."""

    @abstractmethod
    def _delete(self, key: str) -> None:
        """Remove an object."""

    @abstractmethod
    def _objects(self, prefix: str) -> Iterator[StoredObject]:
        """All objects whose keys begin with ``prefix``, which is empty or ends in a slash; in order."""


def gone(uri: str) -> IntegrityError:
    """The error for an artefact that is no longer where it was published."""
    return IntegrityError(f"{uri} was published, and is gone. Restore it, or run the task that makes it again")


def _checked(key: str) -> str:
    """The key itself.

    Raises:
        InputError: it could leave the store, or would not be the same key in every kind of store.
    """
    parts = key.split("/")
    if {"", ".", ".."} & set(parts) or parts[0] == UPLOADING or "\\" in key or not key.isprintable():
        raise InputError(
            f"the key {key!r} was asked for, and is not a relative path in its shortest form. Allowed are names "
            f"joined by single slashes, without '.', '..' and backslashes. Correct it"
        )
    return key


def _compare(ref: ArtifactRef, sha256: str, size: int) -> None:
    if (sha256, size) != (ref.sha256, ref.size):
        raise IntegrityError(
            f"{ref.uri}: {ref.size} bytes with sha256 {ref.sha256} were expected, found are {size} bytes with sha256 "
            f"{sha256}. It was changed after it was published. Restore it, or run the task that makes it again"
        )
