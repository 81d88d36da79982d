"""Where a run's artefacts go, what they must meet, and what runs it."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gisp_tasks.recipe.section import Section
from gisp_tasks.recipe.signing import SigningSection

_PRESETS = frozenset({"@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly"})
_ONLY_SCHEDULES = frozenset({"@once", "@continuous"})
"""Airflow's presets that are no times."""


class MlflowSection(Section):
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


class GateSection(Section):
    """What a level must meet to get its alias; one that does not is registered with the tag gate=failed.

    That the reloaded checkpoint is the masked base model is always checked.
    """

    max_perplexity_ratio: float | None = Field(default=4.0, gt=1.0)
    """Perplexity of the level over that of the dense model, on the first window of the text evaluation."""
    max_accuracy_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """Accuracy of the dense model minus that of the level, 0.05 for five points of a hundred; of every task whose
    accuracy the recipe measures: exact match (flexible) of word problems, mean of the commonsense tasks."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Bytes of the level's checkpoint, all of its files."""


class EncryptionSection(Section):
    """Encryption of objects by the S3 server; one found there without it is refused."""

    method: Literal["sse-s3", "sse-kms"] = "sse-s3"
    """`sse-s3`: under a key of the server's own (AES256). `sse-kms`: under a key of its key management service."""
    kms_key: str | None = Field(default=None, pattern=r"^[A-Za-z0-9:/_-]{1,256}$")
    """Id, ARN or alias of the key for `sse-kms`; null: the account's default key."""

    @model_validator(mode="after")
    def _key_has_a_use(self) -> Self:
        if self.kms_key is not None and self.method != "sse-kms":
            raise ValueError(
                f"kms_key was given, and method is {self.method}, which has no key to choose; set method: sse-kms, or "
                f"remove kms_key"
            )
        return self


class PromotionSection(Section):
    """Which version of a level is its champion, the one that `models:/NAME@champion-sp40` serves."""

    by: Literal["none", "gate", "approval"] = "none"
    """`none`: no run moves a champion. `gate`: a version that passed the gate becomes champion at the end of its run,
    once. `approval`: it becomes champion when one of `approvers` says so, in Airflow or with `gisp approve`."""
    approvers: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(default=(), max_length=50)
    """Ids of the Airflow users who may approve; most auth managers take the user name."""
    timeout_hours: float = Field(default=168.0, gt=0, le=8760)
    """How long Airflow waits for the answer; none by then is no approval."""

    @model_validator(mode="after")
    def _approval_has_approvers(self) -> Self:
        if self.by == "approval" and not self.approvers:
            raise ValueError(
                "by=approval was asked, and nobody is named who may approve; name at least one Airflow user in "
                "`approvers`, or set by: gate"
            )
        if self.by != "approval" and self.approvers:
            raise ValueError(
                f"approvers were named with by={self.by}, which asks nobody; set by: approval, or remove `approvers`"
            )
        return self


class PublishSection(Section):
    """Where the run's artefacts go."""

    store: str = Field(min_length=1)
    """s3://bucket/prefix, or file:///directory."""
    encryption: EncryptionSection | None = None
    """Encryption at rest of an s3:// store; null: whatever the bucket's default is."""
    mlflow: MlflowSection | None = None
    gate: GateSection = GateSection()
    promotion: PromotionSection = PromotionSection()
    signing: SigningSection | None = None
    """Sign every level and the manifest; null: nothing is signed. May be set for a run that is finished: started again,
    it gets its signatures."""

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

    @model_validator(mode="after")
    def _promotion_has_a_registry(self) -> Self:
        if self.promotion.by != "none" and self.mlflow is None:
            raise ValueError(
                f"promotion.by={self.promotion.by} moves an alias of a registered model, and the recipe names no "
                f"registry; add publish.mlflow, or remove publish.promotion"
            )
        return self

    @model_validator(mode="after")
    def _encryption_has_a_server(self) -> Self:
        if self.encryption is not None and not self.store.startswith("s3://"):
            raise ValueError(
                "encryption was given, and the store is a directory, which nobody encrypts; use an s3:// store, or "
                "remove publish.encryption"
            )
        return self


class AirflowSection(Section):
    """How the scheduler runs it."""

    pool: str = "default_pool"
    """Pool of the tasks that need an accelerator; it must exist in Airflow."""
    queue: str | None = None
    """Queue of the tasks that need an accelerator (Celery, Edge); null: the executor's default."""
    steps_per_task: int = Field(default=1, ge=1, le=2000)
    """Consecutive steps fused into one task that keeps the model loaded; the bytes are the same."""
    schedule: str | None = None
    """Cron expression or preset; null: started by hand or by the release watch."""
    watch: str | None = None
    """Cron expression or preset of the release watch: that often `model.source` is asked for its newest revision, and
    one that the watch has not started this recipe with starts it; null: no watch. For hub models, `models:/NAME` and
    s3:// prefixes of releases, with `model.revision` null or a branch."""
    retries: int = Field(default=3, ge=0, le=20)
    """Attempts after the first, for errors that may pass. Permanent errors are never tried again."""

    @field_validator("schedule", "watch")
    @classmethod
    def _times(cls, expression: str | None, info: ValidationInfo) -> str | None:
        presets = _PRESETS if info.field_name == "watch" else _PRESETS | _ONLY_SCHEDULES
        if expression is None or expression in presets:
            return expression
        from croniter import croniter

        if len(expression.split()) != 5 or not croniter.is_valid(expression):
            raise ValueError(
                f"{expression[:60]!r} says no times; allowed are the five fields of cron (minute, hour, day, month, "
                f"day of week), e.g. '0 3 * * *', and {', '.join(sorted(presets))}; correct it"
            )
        return expression
