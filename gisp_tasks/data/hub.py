"""Data sets of the Hugging Face hub that this package knows, each at a pinned revision."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gisp_tasks.errors import InputError, RetryableError

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
_REFUSED = (401, 403, 404)


@dataclass(frozen=True)
class HubDataset:
    """A data set's repository.

    Args:
        repository: ``owner/name`` on the hub.
        revision: commit, 40 hex digits.
        files: split -> file in the repository.
    """

    repository: str
    revision: str
    files: Mapping[str, str]


def _parquet_splits(config: str, *splits: str) -> dict[str, str]:
    return {split: f"{config}/{split}-00000-of-00001.parquet" for split in splits}


DATASETS = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        _parquet_splits("wikitext-2-raw-v1", "train", "validation", "test"),
    ),
    "gsm8k": HubDataset(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        _parquet_splits("main", "train", "test"),
    ),
    "c4": HubDataset(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    # The repositories that lm-eval reads for the tasks of these names.
    "boolq": HubDataset(
        "aps/super_glue",
        "3de24cf8022e94f4ee4b9d55a6f539891524d646",
        _parquet_splits("boolq", "train", "validation"),
    ),
    "piqa": HubDataset(
        "baber/piqa",
        "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
        {"train": "piqa_train.parquet", "validation": "piqa_validation.parquet"},
    ),
    "hellaswag": HubDataset(
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        _parquet_splits("data", "train", "validation"),
    ),
    "winogrande": HubDataset(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        _parquet_splits("winogrande_xl", "train", "validation"),
    ),
    "arc_easy": HubDataset(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        _parquet_splits("ARC-Easy", "train", "validation", "test"),
    ),
    "arc_challenge": HubDataset(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        _parquet_splits("ARC-Challenge", "train", "validation", "test"),
    ),
    "openbookqa": HubDataset(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        _parquet_splits("main", "train", "validation", "test"),
    ),
}


def download(dataset: HubDataset, split: str) -> Path:
    """The local copy of a split's file, from the hub's own cache or downloaded into it.

    Raises:
        InputError: not cached, and the hub cannot be reached (or HF_HUB_OFFLINE is set) or refuses.
        RetryableError: the hub answered, and the download broke off.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = dataset.files[split]
    try:
        return Path(hf_hub_download(dataset.repository, name, repo_type="dataset", revision=dataset.revision))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{dataset.repository}/{name}: not in the local cache, and the Hugging Face hub did not answer, or "
            f"HF_HUB_OFFLINE is set. Allow access to the hub, or set GISP_DATA_ROOT to a mirror directory that has "
            f"this data set's {split}.parquet, or use the embedded data"
        ) from error
    except _client_errors() as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSED:
            raise InputError(
                f"{dataset.repository}/{name} at {dataset.revision}: the hub refused it (status "
                f"{error.response.status_code}). The data set is public; correct or unset HF_TOKEN and HF_ENDPOINT"
            ) from error
        raise RetryableError(f"{dataset.repository}/{name}: the download broke off ({type(error).__name__})") from error


def reachable(dataset: HubDataset, split: str) -> bool:
    """Whether `download` would find the file; asks for its headers only, once, for at most 5 seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    name, revision = dataset.files[split], dataset.revision
    if isinstance(try_to_load_from_cache(dataset.repository, name, revision=revision, repo_type="dataset"), str):
        return True
    url = hf_hub_url(dataset.repository, name, revision=revision, repo_type="dataset")
    try:
        get_hf_file_metadata(url, timeout=_PROBE_TIMEOUT_S)
    except _client_errors() as error:
        logger.info("%s is not reachable: %s", dataset.repository, type(error).__name__)
        return False
    return True


def _client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own error, and that of the HTTP library below it, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)
