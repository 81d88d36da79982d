"""The places that base models come from, and what a revision is in each of them.

=====================  ===============================================  ==========================================
``model.source``       ``model.revision``                               null
=====================  ===============================================  ==========================================
``owner/name``         a commit, branch or tag of the hub's repository  the branch ``main``
``models:/NAME``       the number of a version of the MLflow model      its newest version that is ready
``s3://bucket/prefix`` a release: files right below ``prefix/RELEASE``  the model that lies right below ``prefix``;
                                                                        else the newest complete release
a directory            none                                             the files as they are
=====================  ===============================================  ==========================================

A release on S3 is complete when its ``manifest.json`` is there, which whoever publishes it writes last; what stands in
it is not read. The newest is the one whose ``manifest.json`` was written last.

An *origin* pins a revision for good and fetches its files; `stores.model_source` says what the files are.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from gisp_tasks.cache import cache_directory
from gisp_tasks.errors import InputError, RetryableError
from gisp_tasks.recipe import HUB_COMMIT, HUB_ID, RELEASE
from gisp_tasks.stores.artifacts import open_store

BY_FILES = "digest of the files"
"""The kind of revision of what has none."""

_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "LICENSE*", "README.md")
_CODE = ("*.py",)
_MANIFEST = re.compile(rf"({RELEASE.pattern})/manifest\.json")
_LOOK_UP_TIMEOUT_S = 30
_TOO_MUCH = (408, 429)


def patterns(*, with_code: bool) -> tuple[str, ...]:
    """The names of a model's files."""
    return (*_NEEDED, *_CODE) if with_code else _NEEDED


def is_wanted(name: str, *, with_code: bool) -> bool:
    """Whether a file right in a model's directory belongs to the model."""
    return "/" not in name and not name.startswith(".") and any(map(Path(name).match, patterns(with_code=with_code)))


class Origin(ABC):
    """One source of models.

    Args:
        source: ``model.source`` of a recipe.
    """

    kind: ClassVar[str]
    """What a record calls its revisions."""

    def __init__(self, source: str) -> None:
        self.source = source

    @abstractmethod
    def pin(self, revision: str | None) -> str | None:
        """What ``revision`` means now, in words that mean it for ever; None where only the files tell models apart.

        Raises:
            InputError: there is no such model or revision, or it is not complete.
            RetryableError: the server did not answer.
        """

    @abstractmethod
    def held(self, pinned: str | None) -> Path | None:
        """The directory of this machine where the files may lie already; None if only `fetch` knows."""

    @abstractmethod
    def fetch(self, pinned: str | None, *, with_code: bool) -> Path:
        """The directory of the files, after they were fetched.

        Raises:
            InputError: it is gone.
            RetryableError: the server did not answer.
        """

    @abstractmethod
    def fetch_config(self, pinned: str | None) -> Path:
        """Its config.json alone; as `fetch`."""


class Directory(Origin):
    """A directory of this machine."""

    kind = BY_FILES

    @override
    def pin(self, revision: str | None) -> None:
        directory = self._directory()
        if revision is not None:
            raise InputError(
                f"model.revision={revision!r} was given for the local directory {directory}, which has no "
                f"revisions: its files' digests identify it; remove model.revision"
            )

    @override
    def held(self, pinned: str | None) -> Path:
        return self._directory()

    @override
    def fetch(self, pinned: str | None, *, with_code: bool) -> Path:
        return self._directory()

    @override
    def fetch_config(self, pinned: str | None) -> Path:
        return self._directory() / "config.json"

    def _directory(self) -> Path:
        directory = Path(self.source).expanduser()
        if not directory.is_dir():
            raise InputError(
                f"model.source={self.source!r}: no such directory, and not an 'owner/name' of the hub, models:/NAME of "
                f"MLflow or an s3:// prefix; give the path of a Hugging Face model directory"
            )
        return directory


class Hub(Origin):
    """A repository of the Hugging Face hub, or of a server that speaks its protocol (``HF_ENDPOINT``)."""

    kind = "hub commit"

    @override
    def pin(self, revision: str | None) -> str:
        if revision and HUB_COMMIT.fullmatch(revision):
            return revision
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

        asked = f"model.source={self.source!r}, revision={revision or 'main'}"
        try:
            commit = HfApi().model_info(self.source, revision=revision, timeout=_LOOK_UP_TIMEOUT_S).sha
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise InputError(
                f"{asked}: the hub has no such model or revision, or it is private; check the name, or give a token "
                f"in HF_TOKEN. A local model needs the path of its directory"
            ) from None
        except OfflineModeIsEnabled:
            raise InputError(
                f"{asked}: it is no directory here, so the model hub was to be asked, and HF_HUB_OFFLINE forbids it; "
                f"give a directory or an s3:// prefix, pin a commit that was downloaded before, or unset HF_HUB_OFFLINE"
            ) from None
        except _hub_errors() as error:
            raise _hub_failure(error, asked) from error
        if not commit:
            raise InputError(f"{asked}: the hub names no commit for it; pin one")
        return commit

    @override
    def held(self, pinned: str | None) -> None:
        return None

    @override
    def fetch(self, pinned: str | None, *, with_code: bool) -> Path:
        return self._snapshot(pinned, patterns(with_code=with_code))

    @override
    def fetch_config(self, pinned: str | None) -> Path:
        return self._snapshot(pinned, ("config.json",)) / "config.json"

    def _snapshot(self, commit: str | None, names: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.source, revision=commit, allow_patterns=list(names)))
        except _hub_errors() as error:
            raise RetryableError(
                f"model {self.source}@{commit}: the download failed: {type(error).__name__}"
            ) from error


class Prefix(Origin):
    """An s3:// prefix: a model, or one release of it beside the other."""

    kind = "release"

    @override
    def pin(self, revision: str | None) -> str | None:
        found = list(open_store(self.source).objects(revision or ""))
        if revision is not None:
            if f"{revision}/manifest.json" not in {item.key for item in found}:
                raise InputError(
                    f"model.source={self.source!r}, revision={revision}: no {self.source}/{revision}/manifest.json was "
                    f"found. A release below a prefix is complete when its manifest.json is there; publish it, or give "
                    f"another revision"
                )
            return revision
        if any(item.key == "config.json" for item in found):
            return None
        releases = [(item.modified_s, match[1]) for item in found if (match := _MANIFEST.fullmatch(item.key))]
        if not releases:
            raise InputError(
                f"model.source={self.source!r}: no model file lies below this prefix, and no complete release "
                f"(RELEASE/manifest.json); give the prefix of a model directory, or of its releases"
            )
        return max(releases)[1]

    @override
    def held(self, pinned: str | None) -> Path:
        return cache_of(self._address(pinned))

    @override
    def fetch(self, pinned: str | None, *, with_code: bool) -> Path:
        # Code comes along; `model_source` decides whether it is wanted.
        address = self._address(pinned)
        store, directory = open_store(address), cache_of(address)
        names = [key for key in store.keys("") if is_wanted(key, with_code=True)]
        if not names:
            raise InputError(
                f"model {address}: no model file lies right below it; give a prefix that has a config.json"
            )
        return copy_files(names, directory, store.copy_out)

    @override
    def fetch_config(self, pinned: str | None) -> Path:
        address = self._address(pinned)
        return open_store(address).copy_out("config.json", cache_of(address) / "config.json")

    def _address(self, pinned: str | None) -> str:
        return f"{self.source.rstrip('/')}/{pinned}" if pinned else self.source


def is_hub_id(source: str) -> bool:
    """Whether a source that looks like one of the hub is no directory here."""
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists()


def cache_of(address: str) -> Path:
    """The directory of this machine for copies of the model at an address."""
    return cache_directory() / "models" / hashlib.sha256(address.encode()).hexdigest()[:16]


def copy_files(names: Collection[str], directory: Path, copy: Callable[[str, Path], object]) -> Path:
    """Fill a cached copy: the named files by ``copy(name, path)``, and none that its origin no longer has."""
    for stale in directory.glob("*"):
        if stale.name not in names:
            stale.unlink()
    for name in names:
        copy(name, directory / name)
    return directory


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own error, and that of the HTTP library below it, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _hub_failure(error: Exception, asked: str) -> InputError | RetryableError:
    """The error for a question that the hub did not answer, or refused."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status is not None and status < 500 and status not in _TOO_MUCH:
        return InputError(
            f"{asked}: the hub refuses the question (HTTP {status}); a model that this user may read is needed. Check "
            f"the name, HF_TOKEN and HF_ENDPOINT"
        )
    return RetryableError(
        f"{asked}: it is no directory here, so the model hub was asked, which cannot be reached "
        f"({f'HTTP {status}' if status else type(error).__name__}); make it reachable, or give a directory or an "
        f"s3:// prefix"
    )
