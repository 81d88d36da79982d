"""The recipe: everything a user asks for, in one frozen value. The only reader of user input.

A recipe is a YAML file. Unknown keys, wrong types and values out of range are refused here, before anything
is loaded, with one message that says what was asked, what is allowed and what to do. What can only be known
with the model and the data in hand is checked by `resolve_model`, before the first byte of a run is written.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gisp_tasks.recipe.evaluation import (
    ChoiceEvaluation,
    EvaluationSection,
    ProblemEvaluation,
    SpeedEvaluation,
    TextEvaluation,
)
from gisp_tasks.recipe.export import ExportSection
from gisp_tasks.recipe.method import (
    REFERENCE_PROTECT,
    REFERENCE_STRUCTURE_RATIO,
    ImportanceSection,
    ProtectSection,
    PruningSection,
    level_name,
)
from gisp_tasks.recipe.publish import (
    AirflowSection,
    EncryptionSection,
    GateSection,
    MlflowSection,
    PromotionSection,
    PublishSection,
)
from gisp_tasks.recipe.reading import apply_settings, read_mapping, set_value
from gisp_tasks.recipe.section import Section
from gisp_tasks.recipe.signing import SigningSection
from gisp_tasks.recipe.sources import (
    COMMONSENSE_TASKS,
    FILE_DATASETS,
    HUB_COMMIT,
    HUB_ID,
    ITEM_DATASETS,
    NAMED_DATASETS,
    RELEASE,
    CalibrationSection,
    ModelSection,
)
from gisp_tasks.refs import canonical_json

__all__ = [
    "COMMONSENSE_TASKS",
    "FILE_DATASETS",
    "HUB_COMMIT",
    "HUB_ID",
    "ITEM_DATASETS",
    "NAMED_DATASETS",
    "REFERENCE_PROTECT",
    "RELEASE",
    "AirflowSection",
    "CalibrationSection",
    "ChoiceEvaluation",
    "EncryptionSection",
    "EvaluationSection",
    "ExportSection",
    "GateSection",
    "ImportanceSection",
    "MlflowSection",
    "ModelSection",
    "ProblemEvaluation",
    "PromotionSection",
    "ProtectSection",
    "PruningSection",
    "PublishSection",
    "Recipe",
    "SigningSection",
    "SpeedEvaluation",
    "TextEvaluation",
    "level_name",
]


class Recipe(Section):
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
    export: ExportSection = ExportSection()
    publish: PublishSection
    airflow: AirflowSection = AirflowSection()

    @model_validator(mode="after")
    def _gate_has_its_measure(self) -> "Recipe":
        if self.publish.gate.max_perplexity_ratio is not None and self.evaluation.perplexity_task is None:
            raise ValueError(
                "publish.gate.max_perplexity_ratio is set, but the recipe has no text evaluation to measure it; "
                "add evaluation.wikitext2 (or embedded_text), or set publish.gate.max_perplexity_ratio to null"
            )
        return self

    @model_validator(mode="after")
    def _accuracy_gate_has_its_measure(self) -> "Recipe":
        if self.publish.gate.max_accuracy_drop is not None and not self.evaluation.accuracy_metrics:
            raise ValueError(
                "publish.gate.max_accuracy_drop is set, but the recipe measures no accuracy; add "
                "evaluation.commonsense_qa, or evaluation.gsm8k (or embedded_arithmetic) with a limit other than 0, "
                "or remove publish.gate.max_accuracy_drop"
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
    def _compat_has_its_own_pruning(self) -> "Recipe":
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
    def _objective_fits_the_data(self) -> "Recipe":
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

    @model_validator(mode="after")
    def _watch_has_an_upstream(self) -> "Recipe":
        if self.airflow.watch is not None and (reason := self.model.unwatchable):
            raise ValueError(
                f"airflow.watch={self.airflow.watch!r} asks for new revisions, and the model {reason}; name a hub "
                f"model (with a branch or no revision), models:/NAME or an s3:// prefix of releases, or remove "
                f"airflow.watch"
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

    def with_revision(self, revision: str | None) -> "Recipe":
        """The same recipe of another revision of its model.

        Raises:
            InputError: ``revision`` is not of the form that the source's revisions have.
        """
        model = ModelSection.parse({**self.model.model_dump(), "revision": revision}, origin="model")
        return self.model_copy(update={"model": model})

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of a run: all but how it is kept, signed, promoted and scheduled."""
        kept = {"store", "encryption", "signing", "promotion"}
        value = self.model_dump(mode="json", exclude={"airflow": True, "publish": kept})
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
