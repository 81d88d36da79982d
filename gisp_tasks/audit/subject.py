"""The run that is audited: where it lies, its manifest as found, and reading that trusts nothing recorded."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import sha256_file
from gisp_tasks.stores.artifacts import Store, open_store
from gisp_tasks.tasks.runtime import Run, scratch

Json = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A finished run.

    Args:
        store: opened at the run's prefix.
        manifest: as it was found, of whatever form.
        manifest_sha256: hex digest of its bytes.
    """

    store: Store
    manifest: Json
    manifest_sha256: str

    def digest(self, key: str) -> tuple[str, int]:
        """SHA-256 and size of an object, from its bytes; what the store says of it is not looked at.

        Raises:
            IntegrityError: it is not there.
        """
        with scratch() as directory:
            path = self.store.copy_out(key, directory / "object")
            return sha256_file(path), path.stat().st_size

    def read_json(self, key: str) -> Json:
        """A JSON object as it is now."""
        value: Json = json.loads(self._read(key))
        return value

    def read_yaml(self, key: str) -> Json:
        """A YAML mapping as it is now."""
        import yaml

        value: Json = yaml.safe_load(self._read(key))
        return value

    def load_order(self, key: str) -> tuple[RemovalOrder, dict[str, str]]:
        """A removal order and its metadata as they are now."""
        with scratch() as directory:
            return RemovalOrder.load(self.store.copy_out(key, directory / "removal_order.safetensors"))

    @cached_property
    def run(self) -> Run:
        """The run as its manifest describes it, without addresses.

        Raises:
            InputError: the recorded recipe or model is none.
        """
        recorded = self.manifest["recipe"]
        publish = {**recorded["publish"], "store": "file:///nowhere", "mlflow": None, "promotion": {}}
        recipe = Recipe.parse({**recorded, "publish": publish}, origin="the manifest's recipe")
        return Run(recipe, self.manifest["run_id"], self.manifest["model"], self.store)

    @property
    def level_records(self) -> list[Json]:
        """Those of the pruned levels, in rising sparsity."""
        return [level for level in self.manifest["levels"] if "model" in level]

    def _read(self, key: str) -> str:
        with scratch() as directory:
            return self.store.copy_out(key, directory / "object").read_text(encoding="utf-8")


def locate(run: str) -> Store:
    """The store at the prefix of a run.

    Args:
        run: the prefix (s3:// or file://), or the path of a directory or of a manifest.

    Raises:
        InputError: there is nothing of a run.
    """
    address = run.rstrip("/").removesuffix(f"/{Keys.MANIFEST}")
    if not re.match(r"(s3|file)://", run):
        path = Path(run).expanduser().absolute()
        address = (path if path.is_dir() else path.parent).as_uri()
    store = open_store(address)
    if not any(_exists(store, key) for key in (Keys.MANIFEST, Keys.PLAN, Keys.ORDER)):
        raise _no_run(run, "nothing of a run lies there")
    return store


def _exists(store: Store, key: str) -> bool:
    try:
        return store.stat(key) is not None
    except IntegrityError:  # an object without a digest
        return True


def read_manifest(store: Store) -> tuple[bytes, str]:
    """The manifest's bytes and their digest.

    Raises:
        IntegrityError: it is not there.
    """
    with scratch() as directory:
        path = store.copy_out(Keys.MANIFEST, directory / Keys.MANIFEST)
        return path.read_bytes(), sha256_file(path)


def parse_manifest(data: bytes) -> Mapping[str, Any]:
    """The manifest as a mapping.

    Raises:
        IntegrityError: it is no JSON object.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise IntegrityError("it is no JSON object")
    return value


def _no_run(run: str, found: str) -> InputError:
    return InputError(
        f"RUN={run} was to be verified, and {found}. Allowed are the prefix of a run (s3://…/runs/<run id> or "
        f"file://…/runs/<run id>) and the path of its manifest.json. Correct the address"
    )
