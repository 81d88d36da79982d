"""The recipe: everything a user asks for, in one frozen value. The only reader of user input.

A recipe is a YAML file. Unknown keys, wrong types and values out of range are refused here, before anything
is loaded, with one message that says what was asked, what is allowed and what to do. What can only be known
with the model and the data in hand is checked by `resolve_model`, before the first byte of a run is written.
"""

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gisp_tasks.errors import InputError
from gisp_tasks.recipe_input import apply_settings, describe_errors, read_mapping, set_value
from gisp_tasks.refs import canonical_json

NAMED_DATASETS = ("c4", "wikitext2", "gsm8k", "commonsense_qa", "embedded", "embedded_arithmetic")
FILE_DATASETS = ("tokens", "text", "items")
ITEM_DATASETS = ("commonsense_qa", "items")
# The tasks of `commonsense_qa`, in the order of the published calibration set.
COMMONSENSE_TASKS = ("boolq", "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "winogrande", "piqa")
# The published runs' (METHOD A4): of all structures, not of the parameters.
REFERENCE_STRUCTURE_RATIO = 0.7
REFERENCE_PROTECT = {"first_layers": 0.1, "last_layers": 1}
Level = Annotated[float, Field(ge=0.001, le=0.99)]


class _Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, a docstring a field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=False, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, value: Any, origin: str = "recipe") -> Self:
        """Validate a mapping; errors name ``origin`` and every offending key.

        Raises:
            InputError: as in `Recipe.load`.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InputError(describe_errors(error, cls, origin)) from None


class ModelSection(_Section):
    """Which weights are pruned."""

    source: str = Field(min_length=1, max_length=1024)
    """A model id of the Hugging Face hub, a local directory, or an s3:// prefix; safetensors only."""
    revision: str | None = None
    """Hub commit (40 hex digits) or branch; a branch, or null for `main`, is resolved to a commit at the start."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights while scoring and in the checkpoints; gradients accumulate in float32 in any case."""
    trust_remote_code: bool = False
    """Allow Python code that the model repository ships. Off by default; recorded in the manifest when on."""


class CalibrationSection(_Section):
    """The text whose loss decides what is removed."""

    dataset: Literal[
        "c4", "wikitext2", "gsm8k", "commonsense_qa", "embedded", "embedded_arithmetic", "tokens", "text", "items"
    ]
    """A named data set, or one's own file: `tokens` (.npy, .safetensors), `text` (.txt, .jsonl, .parquet) or `items`
    (.jsonl). `commonsense_qa` is BoolQ, PIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA."""
    split: str = "train"
    """Split of a named data set. For `commonsense_qa`, `train_surrogate` takes a mirror's rows of that name where a
    task has them, and `train` elsewhere; the record names each."""
    path: str | None = None
    """The file, for `tokens`, `text` and `items`."""
    sequences: int = Field(default=2000, ge=1, le=1_000_000)
    """How many sequences are drawn. For `commonsense_qa` and `items`, sequences x sequence_length is a budget of
    tokens, counted over all candidates of an item; `commonsense_qa` splits it evenly over its seven tasks."""
    sequence_length: int = Field(default=256, ge=2, le=131_072)
    """Tokens a sequence. For gsm8k, `commonsense_qa` and `items` the longest that is taken: an item with a longer
    candidate is skipped, and counted."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the draw."""
    overlap: Literal["refuse", "accept"] = "refuse"
    """What is done when the sequences overlap what the recipe's evaluations measure: the run is refused, or goes on
    and its record says so."""

    @model_validator(mode="after")
    def _path_belongs_to_files(self) -> Self:
        if self.dataset in FILE_DATASETS and not self.path:
            raise ValueError(f"dataset={self.dataset} needs `path`, the file to read, and none was given")
        if self.dataset in NAMED_DATASETS and self.path is not None:
            raise ValueError(
                f"path={self.path!r} was given with dataset={self.dataset}, which has no path; "
                f"use dataset: text, tokens or items to read a file, or remove `path`"
            )
        return self


class ImportanceSection(_Section):
    """How a structure's importance is measured: by the task's own loss, globally."""

    score: Literal["taylor", "gate_fisher"] = "taylor"
    """`taylor`: sum over the structure's weights of |weight x gradient| of the whole set's loss (the paper's).
    `gate_fisher`: mean over sequences of the squared derivative of the sequence's loss by a gate on the structure's
    output; needs no weight gradients."""
    normaliser: Literal["elements", "reference"] = "elements"
    """`elements`: the structure's own number of scored weights (the paper's Algorithm 1); `reference`: 4 x head_dim
    x hidden for attention, 3 x intermediate for a channel (the published code)."""
    granularity: Literal["kv_group", "head"] = "kv_group"
    """The attention structure. `kv_group`: a key/value head with the query heads that share it. `head`: one query head
    (the paper's); key/value heads that several share are then no structures, and a level is written by an exact
    conversion that saves little before 20-30 % of the heads are gone."""
    compat: Literal["default", "reference"] = "default"
    """`default`: this project's method; every deviation from the reference code is named in the manifest. `reference`:
    scores, schedule and selection of the published code, in float32, to be checked against it; sets `score: taylor`,
    `normaliser: reference` and `granularity: head`."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_reference(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("compat") != "reference":
            return value
        if value.get("score", "taylor") != "taylor":
            raise ValueError(
                f"score={value['score']} was asked with compat=reference, and the reference code has the first-order "
                f"score only; use score: taylor, or compat: default"
            )
        return {**value, "score": "taylor", "normaliser": "reference", "granularity": "head"}


class ProtectSection(_Section):
    """What is never removed.

    The published runs protect the first tenth of the layers and the last one. In this package's measurements (README)
    that costs quality, so no layer is protected unless a recipe says so.
    """

    first_layers: float = Field(default=0, ge=0.0)
    """Layers at the start: a fraction of them when below 1 (rounded down), else a number of layers."""
    last_layers: float = Field(default=0, ge=0.0)
    """Layers at the end: a fraction of them when below 1 (rounded down), else a number of layers."""
    min_kv_groups: int = Field(default=1, ge=1)
    """Key/value groups that every layer keeps."""
    min_channels: int = Field(default=32, ge=1)
    """MLP channels that every layer keeps."""

    @field_validator("first_layers", "last_layers")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value} is neither a fraction below 1 nor a whole number of layers")
        return value


class PruningSection(_Section):
    """How much is removed, in how many steps, into which shapes."""

    levels: tuple[Level, ...] = Field(default=(0.2, 0.3, 0.4, 0.5), min_length=1, max_length=32)
    """Parameter sparsity of the decoder layers, one level each, rising."""
    steps: int = Field(default=30, ge=1, le=2000)
    """K: scoring passes; the schedule is linear in parameter sparsity up to the last level, or under
    `importance.compat: reference` linear in structures, from 0 to `structure_ratio`."""
    structure_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Fraction of all heads and channels, protected layers included, that the last step takes the model to. Read only
    under `importance.compat: reference`, where it is 0.7 unless set; levels are then cut from the finished order."""
    protect: ProtectSection = ProtectSection()
    width_multiple: int = Field(default=32, ge=1, le=4096)
    """MLP widths are rounded up to a multiple of this (32: fast kernels; 256: llama.cpp K-quants)."""
    compensation: Literal["none", "least_squares"] = "none"
    """What is done to the kept weights after the cut. `none`: nothing, levels share the base model's weights.
    `least_squares`: the o and down projections of every layer are solved anew in closed form, so that the kept inputs
    stand in for the removed ones; each level then has o and down matrices of its own."""
    compensation_data: CalibrationSection | None = None
    """Text for `least_squares`, more of it than scoring needs; null: the calibration sequences."""

    @model_validator(mode="after")
    def _data_has_a_use(self) -> Self:
        if self.compensation_data is not None and self.compensation == "none":
            raise ValueError(
                "compensation_data was given, and compensation is none, which reads no data; set compensation: "
                "least_squares, or remove compensation_data"
            )
        return self

    @field_validator("levels")
    @classmethod
    def _levels_rise(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        for i, (low, high) in enumerate(itertools.pairwise(levels)):
            if high <= low:
                raise ValueError(
                    f"levels[{i + 1}]={high:g} does not rise above levels[{i}]={low:g}; "
                    f"levels are nested, so write them in rising order without repetition"
                )
        names = [level_name(level) for level in levels]
        if len(set(names)) != len(names):
            raise ValueError(f"two levels share a name ({', '.join(names)}); keep them 0.1 % apart")
        return levels


class TextEvaluation(_Section):
    """Token perplexity in non-overlapping windows; the window is part of the metric's name."""

    windows: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(128, 2048), min_length=1, max_length=8)
    """Tokens a window; one longer than the model's context becomes the model's context."""
    limit_tokens: int | None = Field(default=None, ge=2)
    """Evaluate on this many leading tokens only; null: all."""

    @model_validator(mode="after")
    def _limit_holds_a_window(self) -> Self:
        if self.limit_tokens is not None and self.limit_tokens < max(self.windows):
            raise ValueError(
                f"limit_tokens={self.limit_tokens} is less than the window of {max(self.windows)} tokens, so nothing "
                f"could be measured in it; raise limit_tokens or drop that window"
            )
        return self


class ProblemEvaluation(_Section):
    """Exact match through lm-eval, and token perplexity of the reference solutions."""

    shots: int = Field(default=5, ge=0, le=32)
    """Solved examples before each question."""
    limit: int | None = Field(default=None, ge=0)
    """Problems to solve by generation; null: all; 0: none, only the perplexity of solutions is taken."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """Longest answer."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Problems answered at once; scores depend on it, so it is recorded."""
    limit_solutions: int | None = Field(default=None, ge=1)
    """Reference solutions whose perplexity is taken; null: all."""


class ChoiceEvaluation(_Section):
    """Accuracy on BoolQ, ARC-Easy, ARC-Challenge, HellaSwag, OpenBookQA, WinoGrande and PIQA through lm-eval."""

    shots: int = Field(default=0, ge=0, le=32)
    """Solved examples, of the train split, before each question."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each task, the first of its file; null: all."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Answers weighed at once; scores depend on it in the last digits, so it is recorded."""
    split: Literal["validation", "test"] = "validation"
    """`test`: what lm-eval itself evaluates, which is the test split of ARC and OpenBookQA and validation elsewhere
    (the other test splits have no labels)."""


class EvaluationSection(_Section):
    """What every level, and the dense model, is measured on. Leave a key out to skip its task."""

    wikitext2: TextEvaluation | None = None
    """Token perplexity of the WikiText-2 (raw) test split."""
    gsm8k: ProblemEvaluation | None = None
    """Grade-school word problems, test split."""
    commonsense_qa: ChoiceEvaluation | None = None
    """Seven multiple-choice tasks and their mean."""
    embedded_text: TextEvaluation | None = None
    """Token perplexity of the held-back part of the reference text that CPython ships. Works offline."""
    embedded_arithmetic: ProblemEvaluation | None = None
    """Generated arithmetic word problems in GSM8K's schema. Works offline."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the evaluations asked for, in the order of this class."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def perplexity_task(self) -> str | None:
        """The text evaluation whose first window the gate and the report's curve read."""
        return next((name for name in self.tasks if isinstance(getattr(self, name), TextEvaluation)), None)


class MlflowSection(_Section):
    """Where levels are registered."""

    tracking_uri: str = Field(min_length=1)
    """Tracking server, e.g. http://mlflow:5000. Credentials belong in the environment, never here."""
    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,199}$")
    """The registered model; each level is one version of it."""

    @field_validator("tracking_uri")
    @classmethod
    def _no_credentials(cls, uri: str) -> str:
        if not re.fullmatch(r"(https?://[^\s@?#]+|sqlite:///[^\s@?#]+)", uri):
            raise ValueError(
                "the address is neither http(s)://host:port nor sqlite:///file, or it carries a user name, a password "
                "or a query; credentials belong in the environment (MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD) or in an Airflow connection"
            )
        return uri


class GateSection(_Section):
    """What a level must meet to get its alias; one that does not is registered with the tag gate=failed."""

    max_perplexity_ratio: float | None = Field(default=4.0, gt=1.0)
    """Perplexity of the level over that of the dense model, on the first window of the text evaluation."""


class PublishSection(_Section):
    """Where the run's artefacts go."""

    store: str = Field(min_length=1)
    """s3://bucket/prefix, or file:///directory."""
    mlflow: MlflowSection | None = None
    gate: GateSection = GateSection()

    @field_validator("store")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        uri = uri.rstrip("/")
        if not re.fullmatch(r"(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s@]+)?|file:///[^\s@]+)", uri):
            raise ValueError(
                "the address is neither s3://bucket/prefix nor file:///absolute/directory; write it without spaces, "
                "and put credentials into the environment"
            )
        if ".." in uri.split("/"):
            raise ValueError(f"{uri} contains '..'; write the address in full")
        return uri


class AirflowSection(_Section):
    """How the scheduler runs it."""

    pool: str = "default_pool"
    """Pool of the tasks that need an accelerator; it must exist in Airflow."""
    queue: str | None = None
    """Queue of the tasks that need an accelerator (Celery, Edge); null: the executor's default."""
    steps_per_task: int = Field(default=1, ge=1, le=2000)
    """Consecutive steps fused into one task that keeps the model loaded; the bytes are the same."""
    schedule: str | None = None
    """Cron expression or preset; null: started by hand or by the release watch."""
    retries: int = Field(default=3, ge=0, le=20)
    """Attempts after the first, for errors that may pass. Permanent errors are never tried again."""


class Recipe(_Section):
    """One model, one ladder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Names the DAG and, by default, everything a user sees."""
    model: ModelSection
    calibration: CalibrationSection
    objective: Literal["perplexity", "margin"] = "perplexity"
    """`perplexity`: mean token cross-entropy of the calibration sequences. `margin`: mean cross-entropy of the correct
    answers minus that of the wrong ones, for data sets of items (`commonsense_qa`, `items`)."""
    importance: ImportanceSection = ImportanceSection()
    pruning: PruningSection = PruningSection()
    evaluation: EvaluationSection = EvaluationSection()
    publish: PublishSection
    airflow: AirflowSection = AirflowSection()

    @model_validator(mode="after")
    def _gate_has_its_measure(self) -> Self:
        if self.publish.gate.max_perplexity_ratio is not None and self.evaluation.perplexity_task is None:
            raise ValueError(
                "publish.gate.max_perplexity_ratio is set, but the recipe has no text evaluation to measure it; "
                "add evaluation.wikitext2 (or embedded_text), or set publish.gate.max_perplexity_ratio to null"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _pruning_of_the_reference(cls, value: Any) -> Any:
        """What the compatibility mode reads where a recipe does not say it."""
        if not isinstance(value, dict):
            return value
        importance, pruning = value.get("importance"), value.get("pruning", {})
        reference = isinstance(importance, dict) and importance.get("compat") == "reference"
        if not reference or not isinstance(pruning, dict):
            return value
        ratio, protect = pruning.get("structure_ratio"), pruning.get("protect", {})
        filled = {
            "structure_ratio": REFERENCE_STRUCTURE_RATIO if ratio is None else ratio,
            "protect": {**REFERENCE_PROTECT, **protect} if isinstance(protect, dict) else protect,
        }
        return {**value, "pruning": {**pruning, **filled}}

    @model_validator(mode="after")
    def _compat_has_its_own_pruning(self) -> Self:
        if self.importance.compat == "default":
            if self.pruning.structure_ratio is not None:
                raise ValueError(
                    f"pruning.structure_ratio={self.pruning.structure_ratio:g} was set, but importance.compat=default "
                    f"counts parameters, up to the last of pruning.levels; remove structure_ratio, or set "
                    f"importance.compat: reference"
                )
        elif self.pruning.protect != ProtectSection(**REFERENCE_PROTECT):
            raise ValueError(
                "pruning.protect was changed, but importance.compat=reference protects the layers that the reference "
                "code skips (the first tenth and the last) and keeps no minimum in the others; remove pruning.protect, "
                "or set importance.compat: default"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits_the_data(self) -> Self:
        dataset = self.calibration.dataset
        if self.objective == "margin" and dataset not in ITEM_DATASETS:
            raise ValueError(
                f"objective=margin compares correct with wrong answers, and calibration.dataset={dataset} has none; "
                f"use calibration.dataset: {' or '.join(ITEM_DATASETS)}, or objective: perplexity"
            )
        if self.objective == "perplexity" and dataset in ITEM_DATASETS:
            raise ValueError(
                f"objective=perplexity would teach the wrong answers of calibration.dataset={dataset} too; use "
                f"objective: margin, or a data set of text"
            )
        return self

    @property
    def level_names(self) -> tuple[str, ...]:
        """`sp20` for parameter sparsity 0.2, and so on."""
        return tuple(level_name(level) for level in self.pruning.levels)

    @property
    def compensation_section(self) -> CalibrationSection:
        """What least squares reads."""
        return self.pruning.compensation_data or self.calibration

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of a run: all but the addresses it is published to and how it is scheduled."""
        value = self.model_dump(mode="json", exclude={"airflow"})
        del value["publish"]["store"]
        if value["publish"]["mlflow"]:
            del value["publish"]["mlflow"]["tracking_uri"]
        return value

    def to_json(self) -> bytes:
        """Canonical JSON of the whole recipe."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path | str, settings: tuple[str, ...] = (), store: str | None = None) -> "Recipe":
        """Read a recipe file.

        Args:
            path: the YAML file.
            settings: ``key.path=value`` overrides, values in YAML.
            store: replaces ``publish.store``.

        Raises:
            InputError: the file is missing or too large, is not a YAML mapping, or asks for what is not allowed.
        """
        value = read_mapping(Path(path))
        apply_settings(value, settings, cls)
        if store is not None:
            set_value(value, ("publish", "store"), store, origin="--store")
        return cls.parse(value, origin=str(path))


def level_name(sparsity: float) -> str:
    """`sp20` for 0.2, `sp37.5` for 0.375."""
    return f"sp{round(sparsity * 100, 1):g}"
