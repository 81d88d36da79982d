"""Base models that are versions of a registered model: ``models:/NAME``.

The tracking server is that of ``MLFLOW_TRACKING_URI``, as for every MLflow client, and not the one that a recipe
publishes to: a base model often comes from elsewhere.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import override

from gisp_tasks.errors import InputError, RetryableError
from gisp_tasks.stores.origins import Origin, cache_of, copy_files, is_wanted
from gisp_tasks.stores.registry import MlflowRegistry

_PLACES = ("", "/model")
"""Where a Hugging Face directory may lie in a version's own: it is that directory, or (as levels are) has it inside."""


class _Versions(MlflowRegistry):
    """The versions of others' models."""

    def ready(self, name: str) -> list[int]:
        """Numbers of the versions whose files are complete, rising."""
        with self._mapped(f"list the versions of {name}"):
            found = self._client.search_model_versions(f"name = '{name}'")
        return sorted(int(version.version) for version in found if version.status == "READY")

    def address(self, name: str, version: str) -> str:
        """Where the files of a version lie."""
        with self._mapped(f"find the files of version {version} of {name}"):
            return self._client.get_model_version_download_uri(name, version).rstrip("/")

    def names(self, address: str) -> list[str]:
        """The files right below an address."""
        from mlflow.artifacts import list_artifacts

        with self._files(address):
            found = list_artifacts(artifact_uri=address, tracking_uri=self._uri)
        return [item.path.rpartition("/")[2] for item in found if not item.is_dir]

    def copy_out(self, uri: str, path: Path) -> Path:
        """Write one file; it appears when it is complete."""
        from mlflow.artifacts import download_artifacts

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as directory, self._files(uri):
            written = download_artifacts(artifact_uri=uri, dst_path=directory, tracking_uri=self._uri)
            return Path(written).replace(path)

    @contextmanager
    def _files(self, address: str) -> Iterator[None]:
        """MLflow reads a file with whatever client its place needs, and passes on what that one raises."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with self._mapped(f"read {address}"):
                yield
        except (BotoCoreError, ClientError, OSError) as error:
            raise RetryableError(f"could not read {address}: {type(error).__name__}") from error


class RegisteredModel(Origin):
    """A registered model of an MLflow server; a revision is a version's number."""

    kind = "version of the registered model"

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self._name = source.removeprefix("models:/")

    @override
    def pin(self, revision: str | None) -> str:
        versions = self._versions()
        versions.check(create=False)
        ready = versions.ready(self._name)
        asked = int(revision) if revision else max(ready, default=None)
        if asked not in ready:
            raise InputError(
                f"model.source={self.source!r}, revision={revision or 'newest'}: the registry has no such version that "
                f"is ready; it has {', '.join(map(str, ready)) or 'none'}. Register one, correct the name or "
                f"model.revision, or set MLFLOW_TRACKING_URI to the server that has it"
            )
        return str(asked)

    @override
    def held(self, pinned: str | None) -> Path:
        return cache_of(f"{self.source}/{pinned}")

    @override
    def fetch(self, pinned: str | None, *, with_code: bool) -> Path:
        # Code comes along; `model_source` decides whether it is wanted.
        versions, address, names = self._find(pinned)
        wanted = [name for name in names if is_wanted(name, with_code=True)]
        return copy_files(wanted, self.held(pinned), lambda name, path: versions.copy_out(f"{address}/{name}", path))

    @override
    def fetch_config(self, pinned: str | None) -> Path:
        versions, address, _ = self._find(pinned)
        return versions.copy_out(f"{address}/config.json", self.held(pinned) / "config.json")

    def _find(self, pinned: str | None) -> tuple[_Versions, str, list[str]]:
        """The registry, and the address and names of a version's model directory."""
        versions = self._versions()
        address = versions.address(self._name, str(pinned))
        for place in _PLACES:
            names = versions.names(address + place)
            if "config.json" in names:
                return versions, address + place, names
        raise InputError(
            f"model.source={self.source!r}, version {pinned}: there is no config.json in {address} or {address}/model; "
            f"a version is read whose files are a Hugging Face model directory. Register one"
        )

    def _versions(self) -> _Versions:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise InputError(
                f"model.source={self.source!r} names a registered model, and the environment names no registry; set "
                f"MLFLOW_TRACKING_URI, e.g. to http://mlflow:5000, on every worker"
            )
        return _Versions(uri)
