"""Which model, and the text whose loss decides."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gisp_tasks.recipe.section import Section

NAMED_DATASETS = ("c4", "wikitext2", "gsm8k", "commonsense_qa", "embedded", "embedded_arithmetic")
FILE_DATASETS = ("tokens", "text", "items")
ITEM_DATASETS = ("commonsense_qa", "items")
# The tasks of `commonsense_qa`, in the order of the published calibration set.
COMMONSENSE_TASKS = ("boolq", "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "winogrande", "piqa")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""A repository of the hub, or a directory of that name."""
HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""The name of a release below an s3:// prefix."""
_REVISIONS = {
    "models:/": (re.compile(r"[1-9][0-9]{0,8}"), "the number of a version"),
    "s3://": (RELEASE, "the name of a release right below the prefix: letters, digits, '.', '_' and '-'"),
}
"""Beginning of a source -> the form of its revisions; the hub's are any text."""


def _within(path: str | None) -> str | None:
    """The path itself, which does not climb: what a recipe reads is seen at a glance."""
    if path is not None and (".." in path.replace("\\", "/").split("/") or not path.isprintable()):
        raise ValueError("it contains '..' or a control character; write the path in full")
    return path


class ModelSection(Section):
    """Which weights are pruned."""

    source: str = Field(min_length=1, max_length=1024)
    """A model id of the Hugging Face hub, `models:/NAME` of the MLflow registry in `MLFLOW_TRACKING_URI`, a local
    directory, or an s3:// prefix; safetensors only."""
    revision: str | None = Field(default=None, min_length=1, max_length=200)
    """Of a hub's model a commit (40 hex digits), branch or tag, null: `main`; of a registered model the number of a
    version, null: the newest; of an s3:// prefix a release, which lies below it as RELEASE/ and is complete with
    RELEASE/manifest.json, null: the model right below the prefix, or else the newest release. Directories have none.
    Whatever it is, a run pins it at its start, and its record shows what was pinned."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights while scoring and in the checkpoints; gradients accumulate in float32 in any case."""
    trust_remote_code: bool = False
    """Allow Python code that the model repository ships. Off by default; recorded in the manifest when on."""

    _within = field_validator("source", "revision")(_within)

    @field_validator("source")
    @classmethod
    def _registered_model_without_version(cls, source: str) -> str:
        if source.startswith("models:/") and not re.fullmatch(r"models:/[^/@:'\"%]+", source):
            raise ValueError(
                "a registered model is named as models:/NAME, without version, alias or server; give the version as "
                "model.revision, and the server in MLFLOW_TRACKING_URI"
            )
        return source

    @model_validator(mode="after")
    def _revision_is_of_its_source(self) -> Self:
        for beginning, (form, allowed) in _REVISIONS.items():
            if self.source.startswith(beginning) and self.revision is not None and not form.fullmatch(self.revision):
                raise ValueError(
                    f"revision={self.revision!r} was given for a source that begins with {beginning}; allowed is "
                    f"{allowed}, or null for the newest; correct model.revision"
                )
        return self

    @property
    def unwatchable(self) -> str | None:
        """Why no new revision of it can ever be found; None if one can."""
        if self.source.startswith(tuple(_REVISIONS)):
            return "names one revision" if self.revision is not None else None
        if not HUB_ID.fullmatch(self.source):
            return "is a directory, which has no revisions"
        return "names one commit" if self.revision and HUB_COMMIT.fullmatch(self.revision) else None


class CalibrationSection(Section):
    """The text whose loss decides what is removed."""

    dataset: Literal[
        "c4", "wikitext2", "gsm8k", "commonsense_qa", "embedded", "embedded_arithmetic", "tokens", "text", "items"
    ]
    """A named data set, or one's own file: `tokens` (.npy, .safetensors), `text` (.txt, .jsonl, .parquet) or `items`
    (.jsonl). `commonsense_qa` is BoolQ, PIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA."""
    split: str = "train"
    """Split of a named data set. For `commonsense_qa`, `train_surrogate` takes a mirror's rows of that name where a
    task has them, and `train` elsewhere; the record names each."""
    path: str | None = Field(default=None, max_length=4096)
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

    _path_within = field_validator("path")(_within)

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
