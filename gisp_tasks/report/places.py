"""Where else a run can be seen, and what to type to get at it. A link that cannot work is not made."""

import ipaddress
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, kw_only=True)
class Places:
    """Addresses of a run's other pages, as far as they are known.

    Args:
        tracking_uri: of MLflow.
        experiment_id: MLflow's own, of the run's experiment.
        mlflow_run: MLflow's own run id.
        airflow_run: the run's page in Airflow.
    """

    tracking_uri: str | None = None
    experiment_id: str | None = None
    mlflow_run: str | None = None
    airflow_run: str | None = None

    @property
    def airflow_link(self) -> str | None:
        """The run in Airflow."""
        return self.airflow_run if self.airflow_run and _is_shared(self.airflow_run) else None

    @property
    def mlflow_link(self) -> str | None:
        """The run in MLflow."""
        if self.experiment_id is None or self.mlflow_run is None:
            return None
        return self._mlflow(f"experiments/{quote(self.experiment_id)}/runs/{quote(self.mlflow_run)}")

    def version_link(self, level: Mapping[str, Any]) -> str | None:
        """The registered version of a level of the summary."""
        if level["model_version"] is None:
            return None
        return self._mlflow(f"models/{quote(level['model_name'], safe='')}/versions/{level['model_version']}")

    def _mlflow(self, page: str) -> str | None:
        if self.tracking_uri is None or not _is_shared(self.tracking_uri):
            return None
        return f"{self.tracking_uri.rstrip('/')}/#/{page}"


def _is_shared(address: str) -> bool:
    """Whether a browser on another machine may open it: a web address, and not this machine's own name for itself."""
    parts = urlsplit(address)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return True
    return not (found.is_loopback or found.is_unspecified)


def commands(summary: Mapping[str, Any], base: str) -> list[tuple[str, str]]:
    """What to do and the command line that does it.

    Args:
        summary: of the run.
        base: source of the base model.
    """
    store = summary["store"]
    shown = [("Check every byte of this run against its record", ["gisp", "verify", store])]
    order = f"{store}/removal_order.safetensors"
    levels = summary["levels"][1:]
    if levels:
        sparsity = f"{levels[-1]['param_sparsity'] / 2:.2f}"
        words = ["gisp", "materialize", "--model", base, "--order", order, "--sparsity", sparsity, "--out", "level"]
        shown.append((f"Cut another level, here at {float(sparsity):.0%}", words))
    for level in levels:
        if level["uri"].startswith("s3://"):
            words = ["aws", "s3", "cp", "--recursive", f"{level['uri']}/model", level["name"]]
            shown.append((f"Download the checkpoint of {level['name']}", words))
    return [(purpose, shlex.join(words)) for purpose, words in shown]
