"""The MLflow tracking server: one MLflow run per pipeline run, one model version per level.

Every call may be repeated: a run is found again by its tag `gisp.run_id`, a version by its level, digest, run and
source. So a task that was killed between two calls does the rest when it is tried again. Credentials come from
MLflow's own environment variables and nowhere else; nothing here changes MLflow's process-wide state.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from gisp_tasks.errors import GispError, InputError, PermanentError, RegistryUnavailableError
from gisp_tasks.stores.lineage import dataset_input, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.entities import PagedList

logger = logging.getLogger(__name__)

RUN_TAG = "gisp.run_id"
LEVEL_TAG = "gisp.level"
DIGEST_TAG = "gisp.digest"
GATE_TAG = "gate"
MANIFEST_TAG = "gisp.manifest.sha256"
"""Of the MLflow run: the digest of its ``manifest.json``."""

_SQLITE = "sqlite:///"
_SET_LOGIN = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_PROBE_TIMEOUT_S = 4  # to connect, and again to answer
_PARAMS_PER_BATCH = 100
_ENTRIES_PER_PAGE = 500
_MAX_PARAM_CHARACTERS = 6000
_MAX_REASON_CHARACTERS = 500
_RETRYABLE_STATUSES = (408, 409, 429, 499)  # and 5xx


@dataclass(frozen=True, kw_only=True)
class LevelVersion:
    """A level, uploaded and evaluated, as it is to be registered.

    Args:
        model_name: the registered model.
        level: name of the level, e.g. ``sp40``.
        source: address of the directory that holds its ``MLmodel``.
        digest: hex SHA-256 of that directory's listing.
        run_id: the pipeline run that made it.
        mlflow_run: the MLflow run of that pipeline run.
        gate_passed: whether it may be served under its alias.
        tags: what else a reader of the registry should see, e.g. key metrics, parameters, base revision.
    """

    model_name: str
    level: str
    source: str
    digest: str
    run_id: str
    mlflow_run: str
    gate_passed: bool
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_tags(self) -> dict[str, str]:
        """`tags` and those that this module reads again."""
        gate = gate_verdict(self.gate_passed)
        own = {RUN_TAG: self.run_id, LEVEL_TAG: self.level, DIGEST_TAG: self.digest, GATE_TAG: gate}
        return {**self.tags, **own}


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model; ``alias`` is that of its level, if it points to this version."""

    name: str
    version: int
    source: str
    alias: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a registry holds.

    Args:
        models: names of the registered models, those without a version too.
        places: ``model/version`` -> its source, and ``/runs/<run_id>`` of its tag: a copy keeps the tag, with another
            source.
    """

    models: frozenset[str]
    places: Mapping[str, str]


def alias_name(level: str) -> str:
    """The alias of a level: its name, with ``_`` for the dot that MLflow does not allow (sp37.5 -> sp37_5)."""
    return level.replace(".", "_")


def gate_verdict(passed: bool) -> str:
    """The value of `GATE_TAG`, and what summaries and asset events say."""
    return "passed" if passed else "failed"


def champion_alias(level: str) -> str:
    """The alias of the version of a level that was promoted: ``champion-sp40``."""
    return f"champion-{alias_name(level)}"


class MlflowRegistry:
    """A tracking server with its model registry.

    Args:
        tracking_uri: ``http://…``, ``https://…``, or ``sqlite:///PATH`` for a database file without a server.

    Raises:
        InputError: another kind of address, or one that carries a password.
    """

    def __init__(self, tracking_uri: str) -> None:
        if "@" in urlsplit(tracking_uri).netloc:
            raise InputError(
                f"publish.mlflow.tracking_uri: the address carries a user name or a password, which logs would show; "
                f"only an address without them is allowed. {_SET_LOGIN}"
            )
        if not tracking_uri.startswith(("http://", "https://", _SQLITE)):
            raise InputError(
                f"publish.mlflow.tracking_uri={tracking_uri}: not the address of a tracking server; http://, https:// "
                f"and {_SQLITE}PATH are allowed. Give one of these, e.g. http://mlflow:5000"
            )
        self._uri = tracking_uri
        self._remote = not tracking_uri.startswith(_SQLITE)
        self._database = Path(tracking_uri.removeprefix(_SQLITE))  # read only where there is no server

    def check(self, *, create: bool = True) -> None:
        """Ask the tracking server one question, without MLflow's minutes of retries.

        Args:
            create: make a database file that does not exist yet, where there is no server.

        Raises:
            InputError: what answers at the address is no tracking server, or refuses these credentials; or the
                database file cannot be used.
            RegistryUnavailableError: nothing answers, or the server is out of order.
        """
        if self._remote:
            self._probe_server()
            return
        missing = not create and not self._database.is_file()
        found = "there is no such file" if missing else self._probe_database()
        if found is not None:
            cure = "or name one that does not exist yet" if create else "or name the registry that knows the models"
            raise InputError(
                f"publish.mlflow.tracking_uri={self._uri}: {_shorten(found)}; a database file that MLflow can write is "
                f"needed. Correct the path or its permissions, {cure}"
            )

    @classmethod
    def existing(cls, tracking_uri: str) -> "MlflowRegistry":
        """A registry that is there already, and answers: a new database would know of nothing.

        Raises:
            InputError: as in `check`, or there is no such database file.
            RegistryUnavailableError: as in `check`.
        """
        registry = cls(tracking_uri)
        registry.check(create=False)
        return registry

    def check_source(self, uri: str) -> None:
        """Whether a version may point below ``uri``.

        Raises:
            InputError: a tracking server does not take addresses of this machine's files.
        """
        if self._remote and urlsplit(uri).scheme in ("", "file"):
            raise InputError(
                f"publish.store={uri} with publish.mlflow.tracking_uri={self._uri}: the store is a directory of this "
                f"machine, and an MLflow server registers only addresses that its clients can reach, such as "
                f"s3://bucket/prefix. Use an s3:// store, or {_SQLITE}PATH as tracking_uri"
            )

    def open_run(
        self, *, experiment: str, run_id: str, parameters: Mapping[str, Any], datasets: Sequence[Mapping[str, str]]
    ) -> str:
        """The MLflow run of a pipeline run, found by its tag or created, and set running.

        Args:
            experiment: created if missing.
            run_id: the pipeline run.
            parameters: the recipe; sections are flattened to dotted names. A parameter that the run has already
                keeps its value, since MLflow allows no other.
            datasets: each with ``name``, ``source`` (an address), ``digest`` (hex SHA-256) and ``context``
                (calibration or evaluation). MLflow keeps 36 characters of the digest; the tag `gisp.sha256` of the
                input has all of it.

        Returns:
            MLflow's own run id.
        """
        with self._mapped(f"open the MLflow run of {run_id}"):
            experiment_id = self._experiment_id(experiment)
            run = self._only_run(experiment_id, run_id) or self._create_run(experiment_id, run_id)
            mlflow_run: str = run.info.run_id
            if run.info.status != "RUNNING":
                self._client.update_run(mlflow_run, status="RUNNING")
            self._log_parameters(mlflow_run, flatten(parameters), known=run.data.params)
            self._client.log_inputs(mlflow_run, datasets=[dataset_input(dataset) for dataset in datasets])
        return mlflow_run

    def experiment_of(self, mlflow_run: str) -> str:
        """MLflow's id of the experiment that a run belongs to."""
        with self._mapped(f"find the experiment of MLflow run {mlflow_run}"):
            return str(self._client.get_run(mlflow_run).info.experiment_id)

    def log_metrics(self, mlflow_run: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Write metrics; MLflow allows letters, digits and ``_-./: `` in their names."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._mapped(f"log metrics to MLflow run {mlflow_run}"):
            self._client.log_batch(mlflow_run, metrics=[Metric(k, v, now_ms, step) for k, v in metrics.items()])

    def log_text(self, mlflow_run: str, text: str, *, artifact_file: str) -> None:
        """Write a small text as a file of the run."""
        with self._mapped(f"write {artifact_file} to MLflow run {mlflow_run}"):
            self._client.log_text(mlflow_run, text, artifact_file)

    def tag_run(self, mlflow_run: str, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with self._mapped(f"tag MLflow run {mlflow_run}"):
            for key, value in tags.items():
                self._client.set_tag(mlflow_run, key, value)

    def log_artifact(self, mlflow_run: str, path: Path, *, artifact_path: str | None = None) -> None:
        """Copy a small file to the run, into its directory ``artifact_path``."""
        with self._mapped(f"write {path.name} to MLflow run {mlflow_run}"):
            self._client.log_artifact(mlflow_run, str(path), artifact_path)

    def close_run(self, mlflow_run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Set the run's last status."""
        with self._mapped(f"close MLflow run {mlflow_run}"):
            self._client.set_terminated(mlflow_run, status)

    def register_level(self, level: LevelVersion) -> RegisteredVersion:
        """Make a level a version of its registered model, once.

        A level that passed its gate gets the alias `alias_name`, taken from the version that had it before. One
        that failed gets the tag ``gate=failed`` and no alias, and leaves an earlier alias where it is.

        Raises:
            InputError: as `check_source`.
        """
        self.check_source(level.source)
        with self._mapped(f"register {level.level} as a version of {level.model_name}"):
            version = self._only_version(level) or self._create_version(level)
            number = str(version.version)
            for key, value in level.all_tags.items():
                if version.tags.get(key) != value:
                    self._client.set_model_version_tag(level.model_name, number, key, value)
            alias = alias_name(level.level) if level.gate_passed else None
            if alias is not None:
                self._client.set_registered_model_alias(level.model_name, alias, number)
        logger.info("%s is version %s of %s, gate %s", level.level, number, level.model_name, level.all_tags[GATE_TAG])
        return RegisteredVersion(
            name=level.model_name, version=int(number), source=level.source, alias=alias, tags=level.all_tags
        )

    def versions(self, model_name: str) -> list[RegisteredVersion]:
        """All versions of a registered model by rising number; none if there is no such model."""
        with self._mapped(f"list the versions of {model_name}"):
            found = self._client.search_model_versions(f"name = '{model_name}'")
        numbers = self.aliases(model_name)
        registered = []
        for version in sorted(found, key=_number):
            number, alias = _number(version), alias_name(version.tags.get(LEVEL_TAG, ""))
            held = alias if numbers.get(alias) == number else None
            registered.append(
                RegisteredVersion(
                    name=model_name, version=number, source=version.source or "", alias=held, tags=dict(version.tags)
                )
            )
        return registered

    def aliases(self, model_name: str) -> dict[str, int]:
        """Version number by alias of a registered model; none if there is no such model."""
        with self._mapped(f"list the aliases of {model_name}"):
            if not self._client.search_registered_models(f"name = '{model_name}'"):
                return {}
            aliases = self._client.get_registered_model(model_name).aliases
        return {alias: int(number) for alias, number in aliases.items()}

    def set_alias(self, model_name: str, alias: str, version: int) -> None:
        """Point an alias to a version, whatever it pointed to before."""
        with self._mapped(f"point {alias} of {model_name} to version {version}"):
            self._client.set_registered_model_alias(model_name, alias, str(version))

    def tag(self, model_name: str, version: int, key: str, value: str) -> None:
        """Set one tag of a version."""
        with self._mapped(f"tag version {version} of {model_name}"):
            self._client.set_model_version_tag(model_name, str(version), key, value)

    def run_tags(self, *, experiment: str, run_id: str) -> dict[str, str] | None:
        """The tags of the MLflow run of a pipeline run; None if there is none."""
        with self._mapped(f"find the MLflow run of {run_id}"):
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                return None
            runs = self._client.search_runs([found.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        return dict(runs[0].data.tags) if runs else None

    def inventory(self) -> "Inventory":
        """Everything that is registered, by this package or by others."""
        with self._mapped("list what is registered"):
            models = list(_pages(self._client.search_registered_models))
            versions = list(_pages(self._client.search_model_versions))
        return Inventory(
            models=frozenset(model.name for model in models),
            places={f"{v.name}/{v.version}": f"{v.source} /runs/{v.tags.get(RUN_TAG, '')}" for v in versions},
        )

    @cached_property
    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        # Both addresses are given, so that MLFLOW_REGISTRY_URI cannot send versions elsewhere than runs.
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _probe_server(self) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        kind: type[GispError] = RegistryUnavailableError
        try:
            # A question that needs a login, unlike /health; the client's own calls take no time limit.
            response = http_request(  # type: ignore[no-untyped-call]
                get_default_host_creds(self._uri),  # type: ignore[no-untyped-call]
                "/api/2.0/mlflow/experiments/search",
                "GET",
                params={"max_results": 1},
                max_retries=0,
                timeout=_PROBE_TIMEOUT_S,
                raise_on_status=False,
            )
        except MlflowException as error:
            found = f"no answer ({error.message})"
        else:
            status = response.status_code
            if status == 200 and "json" in response.headers.get("content-type", ""):
                return
            if status in (401, 403):
                found = f"the server refuses the credentials (HTTP {status})"
            else:
                found = f"what answers there is no MLflow tracking server in service (HTTP {status})"
            if not _may_pass(status):
                kind = InputError
        raise kind(
            f"publish.mlflow.tracking_uri={self._uri}: {_shorten(found)}; a running MLflow tracking server that "
            f"accepts this user is needed. Start it or correct the address; for a login: {_SET_LOGIN}"
        )

    def _probe_database(self) -> str | None:
        """What is wrong with the database file, or None. MLflow creates a missing one."""
        try:
            self._database.parent.mkdir(parents=True, exist_ok=True)
            # Before MLflow does: it tries an unusable file ten times over minutes.
            with closing(sqlite3.connect(self._database)) as connection:
                connection.execute("PRAGMA schema_version")
            with self._mapped("read the database"):
                self._client.search_experiments(max_results=1)
        except (OSError, sqlite3.Error, GispError) as error:
            return f"the database cannot be used ({error})"
        return None

    def _experiment_id(self, name: str) -> str:
        # Without a server, MLflow would put artefacts under the current directory.
        beside = None if self._remote else (self._database.absolute().parent / "mlartifacts").as_uri()
        _create_unless_there(lambda: self._client.create_experiment(name, artifact_location=beside))
        found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "deleted":
            raise InputError(
                f"experiment {name!r} was asked for, and found deleted on {self._uri}; runs go only into an active "
                f"experiment. Restore it (mlflow experiments restore) or delete it for good (mlflow gc)"
            )
        return str(found.experiment_id)

    def _log_parameters(self, mlflow_run: str, parameters: Mapping[str, str], *, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(k, v[:_MAX_PARAM_CHARACTERS]) for k, v in parameters.items() if k not in known]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            self._client.log_batch(mlflow_run, params=new[start : start + _PARAMS_PER_BATCH])

    def _only_run(self, experiment_id: str, run_id: str) -> "Run | None":
        """The MLflow run of a pipeline run, after removing the copies that a repeated request made."""
        found = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'")
        runs = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        for copy in runs[1:]:
            logger.warning("MLflow run %s is a copy of %s: removed", copy.info.run_id, runs[0].info.run_id)
            self._client.delete_run(copy.info.run_id)
        return runs[0] if runs else None

    def _create_run(self, experiment_id: str, run_id: str) -> "Run":
        created = self._client.create_run(experiment_id, tags={RUN_TAG: run_id}, run_name=run_id)
        # MLflow's client sends a request again when its answer was lost, so one call may have made two.
        return self._only_run(experiment_id, run_id) or created

    def _only_version(self, level: LevelVersion) -> "ModelVersion | None":
        """The version of a level, after removing the copies that a repeated request made."""
        found = self._client.search_model_versions(
            f"name = '{level.model_name}' and tag.`{DIGEST_TAG}` = '{level.digest}' "
            f"and tag.`{LEVEL_TAG}` = '{level.level}' and tag.`{RUN_TAG}` = '{level.run_id}'"
        )
        # The same run published to another store is another version: the old address may be gone.
        versions = sorted((v for v in found if v.source == level.source), key=_number)
        for copy in versions[1:]:
            logger.warning("Version %s of %s is a copy of %s: removed", copy.version, copy.name, versions[0].version)
            self._client.delete_model_version(copy.name, str(copy.version))
        return versions[0] if versions else None

    def _create_version(self, level: LevelVersion) -> "ModelVersion":
        _create_unless_there(lambda: self._client.create_registered_model(level.model_name))
        # The tags travel with the creation, so that a version is never without those it is found by.
        created = self._client.create_model_version(
            level.model_name, level.source, run_id=level.mlflow_run, tags=level.all_tags
        )
        # As in `_create_run`.
        return self._only_version(level) or created

    @contextmanager
    def _mapped(self, action: str) -> Iterator[None]:
        """Turn every failure of MLflow into one of this package's errors."""
        from mlflow.exceptions import MlflowException
        from requests import HTTPError

        try:
            yield
        except MlflowException as error:
            status = error.get_http_status_code()  # type: ignore[no-untyped-call]
            raise self._error(action, status, error.message) from error
        except HTTPError as error:  # from the artefact calls
            status = error.response.status_code if error.response is not None else 503
            raise self._error(action, status, str(error)) from error

    def _error(self, action: str, status: int, message: str) -> GispError:
        reason = f"could not {action} at {self._uri}: {_shorten(message)}"
        if status in (401, 403):
            return InputError(
                f"{reason}. The server refused (HTTP {status}); a user who may do this is needed. {_SET_LOGIN}"
            )
        if _may_pass(status):
            return RegistryUnavailableError(reason)
        return PermanentError(reason)


def _create_unless_there(create: Callable[[], object]) -> None:
    """Create what may exist already, by an earlier run or by one at the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _pages(search: "Callable[..., PagedList[Any]]") -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=_ENTRIES_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _may_pass(status: int) -> bool:
    return status in _RETRYABLE_STATUSES or status >= 500


def _number(version: "ModelVersion") -> int:
    return int(version.version)


def _shorten(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MAX_REASON_CHARACTERS else f"{text[:_MAX_REASON_CHARACTERS]}…"
