"""Where a run's artefacts go, and what runs it."""

import re

from pydantic import Field, field_validator

from gisp_tasks.recipe.section import Section
from gisp_tasks.recipe.signing import SigningSection


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
    """What a level must meet to get its alias; one that does not is registered with the tag gate=failed."""

    max_perplexity_ratio: float | None = Field(default=4.0, gt=1.0)
    """Perplexity of the level over that of the dense model, on the first window of the text evaluation."""


class PublishSection(Section):
    """Where the run's artefacts go."""

    store: str = Field(min_length=1)
    """s3://bucket/prefix, or file:///directory."""
    mlflow: MlflowSection | None = None
    gate: GateSection = GateSection()
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
    retries: int = Field(default=3, ge=0, le=20)
    """Attempts after the first, for errors that may pass. Permanent errors are never tried again."""
