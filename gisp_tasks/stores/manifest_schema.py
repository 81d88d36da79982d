"""The form of a run's manifest: the one source of its JSON Schema, and what is checked on writing and by an audit.

``manifest.schema.json`` beside this file is `json_schema`, for readers without Python. After a change here:
``python -c "from gisp_tasks.stores import manifest_schema as m; m.SCHEMA_FILE.write_bytes(m.json_schema())"``
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gisp_tasks.refs import canonical_json

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
FORMAT_VERSION = 2

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Facts = dict[str, Any]
"""What its writer describes in words of its own."""


class Part(BaseModel):
    """Base of all parts: JSON types as they are, no keys but these."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class FileRecord(Part):
    """A file or an object."""

    sha256: Sha256
    size: Count


class KeyRecord(Part):
    """An artefact of the run by its key below the run's prefix."""

    key: str
    sha256: Sha256


class DirectoryRecord(Part):
    """A published directory: ``sha256`` is that of its listing ``<key>.json``, ``size`` that of all its files."""

    key: str
    sha256: Sha256
    size: Count


class ModelRecord(Part):
    """The base model; ``revision`` is a hub commit, or the digest of the files."""

    source: str
    revision: str
    revision_kind: str
    trust_remote_code: bool
    licence: str | None
    config: Facts
    files: dict[str, FileRecord]


class TokenizerRecord(Part):
    """Those of the model's files that decide how text becomes tokens."""

    files: dict[str, FileRecord]


class DataFile(Part):
    """One file of rows."""

    name: str
    sha256: Sha256
    size: Count


class DataSource(Part):
    """A split of a data set, and where it was found; of several tasks, each one's own is under ``tasks``."""

    dataset: str
    split: str
    origin: str
    revision: str | None
    """Hub commit; null elsewhere."""
    digest: Sha256
    rows: Count
    files: list[DataFile] = []
    repository: str | None = None
    tasks: "dict[str, DataSource]" = {}


class Datasets(Part):
    """Everything that was read besides the model."""

    calibration: DataSource
    compensation: DataSource | None
    evaluation: dict[str, DataSource]


class Contamination(Part):
    """What of the calibration sequences is in the evaluations, by which criterion."""

    criterion: str
    n: Count
    tolerated_share: float
    evaluations: Facts
    accepted: bool
    """There was more of it than is tolerated, and the recipe accepted that."""


class CalibrationRecord(Part):
    """The sequences; counts of what a sampler passed over stand beside these keys."""

    model_config = ConfigDict(extra="allow")

    dataset: str
    source: DataSource
    tokenizer: Facts | None
    sampling: str
    seed: Count
    sequences: Count
    sequence_length: Count
    num_tokens: Count
    num_targets: Count
    contamination: Contamination
    tokens_sha256: Sha256


class StepRecord(Part):
    """One scoring pass and its removals."""

    number: Annotated[int, Field(ge=1)]
    target_sparsity: float | None
    structure_ratio: float | None
    completes: list[str]
    objective: float
    micro_batch_tokens: Count
    removed: Count
    scores_sha256: Sha256
    removal_order_sha256: Sha256


class ComputedOn(Part):
    """Hardware and settings under which some steps were scored."""

    steps: list[int]
    cpu: str
    device: str
    """The accelerator, or cpu."""
    package_sha256: Sha256
    torch: str
    cuda: str | None
    cudnn: int | None
    threads: Count
    deterministic_algorithms: bool
    matmul_precision: str
    tf32: bool
    cublas_workspace: str | None
    seed: Count


class Measured(Part):
    """Metrics, and by the same names everything that they depend on besides the weights."""

    metrics: dict[str, float]
    protocol: dict[str, Facts]


class MeasuredLevel(Measured):
    """As published in ``evaluation.json``."""

    sha256: Sha256


class ReloadRecord(Part):
    """The checkpoint, loaded anew, against the masked base model."""

    max_logit_difference: float
    greedy_equal: bool
    greedy_tokens: Count
    num_tokens: Count
    tolerance: float
    versions: dict[str, str]


class GgufRecord(Part):
    """A level's file for llama.cpp, and what reading it back found."""

    key: str
    sha256: Sha256
    size: Count
    type: str
    num_tensors: Count
    kept_float16: Count
    max_difference: float


class GateRecord(Part):
    """What decided about the level's alias."""

    passed: bool
    checks: list[Facts]


class DenseRecord(Part):
    """The base model, measured as its levels are."""

    name: Literal["dense"]
    param_sparsity: float
    parameters: Count
    bytes: Count
    evaluation: Measured


class LevelRecord(Part):
    """One level; what an export adds to it stands beside these keys."""

    model_config = ConfigDict(extra="allow")

    name: str
    target_sparsity: float
    param_sparsity: float
    parameters: Count
    weight_bytes: Count
    bytes: Count
    query_heads: list[Count]
    kv_groups: list[Count]
    channels: list[Count]
    keep_set_sha256: Sha256
    compensation: Facts | None
    model: DirectoryRecord
    gguf: GgufRecord | None
    package: dict[str, FileRecord]
    evaluation: MeasuredLevel
    reload: ReloadRecord
    gate: GateRecord


class Environment(Part):
    """Where the manifest was written."""

    package: str
    package_sha256: Sha256
    python: str
    packages: dict[str, str]
    platform: str
    machine: str
    cpu: str
    accelerator: str | None
    cuda: str | None


class Trigger(Part):
    """Who had the run finished, as far as it is known."""

    by: Literal["airflow", "command line"]
    dag_id: str
    dag_run_id: str
    run_type: str
    user: str | None


class Manifest(Part):
    """Every input, version, digest and metric of a run."""

    format_version: Literal[2]
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    recipe: Facts
    """All of the recipe that decides a byte."""
    plan: KeyRecord
    model: ModelRecord
    tokenizer: TokenizerRecord
    datasets: Datasets
    calibration: CalibrationRecord
    compensation: CalibrationRecord | None
    steps: list[StepRecord]
    computed_on: list[ComputedOn]
    removal_order: KeyRecord
    levels: Annotated[list[DenseRecord | LevelRecord], Field(min_length=1)]
    artifacts: dict[str, FileRecord]
    """Every object of the run by key, less checkpoints (their listings are here), signatures, timings, the page and
    the manifest itself."""
    environment: Environment
    deviations: list[str]
    """From the published reference code."""
    sha256: Sha256
    """Of everything above: equal for every run of the same recipe, model and data on the same kind of machine."""
    trigger: Trigger
    document_sha256: Sha256
    """Of everything above, trigger and ``sha256`` included."""


def json_schema() -> bytes:
    """The JSON Schema of a manifest."""
    return canonical_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()})
