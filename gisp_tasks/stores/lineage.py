"""What an MLflow run says of its recipe and its data: parameters and data sets in MLflow's own terms."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_MAX_DIGEST_CHARACTERS = 36


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, with dotted keys; what is no string becomes JSON."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item)
    return flat


def dataset_input(dataset: Mapping[str, str]) -> "DatasetInput":
    """A data set as MLflow keeps it: ``name``, ``source`` (an address), ``digest`` (hex SHA-256) and ``context``."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    scheme = urlsplit(dataset["source"]).scheme
    kind = {"": "local", "file": "local", "https": "http"}.get(scheme, scheme)  # MLflow's names of kinds of source
    return DatasetInput(
        dataset=Dataset(
            name=dataset["name"],
            digest=dataset["digest"][:_MAX_DIGEST_CHARACTERS],
            source_type=kind,
            source=json.dumps({"url" if kind == "http" else "uri": dataset["source"]}),
        ),
        tags=[InputTag(MLFLOW_DATASET_CONTEXT, dataset["context"]), InputTag("gisp.sha256", dataset["digest"])],
    )
