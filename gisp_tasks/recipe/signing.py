"""Who vouches for a run's models."""

from typing import Self

from pydantic import Field, model_validator

from gisp_tasks.recipe.section import Section


class SigningSection(Section):
    """The key that signs every level and the manifest, in the OpenSSF model-signing format.

    A private elliptic-curve key (P-256, P-384 or P-521) in PEM form. The key itself never stands in a recipe. It must
    be at hand on every worker that runs `resolve_model`, `upload_to_s3` or `report`.
    """

    private_key_path: str | None = Field(default=None, min_length=1, max_length=1024, pattern=r"^[^\n]+$")
    """File that holds the key."""
    private_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    """Name of the environment variable that holds the key's text, not the text itself."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.private_key_path is None) == (self.private_key_env is None):
            raise ValueError(
                "a key has one place, and both or none were named; set either private_key_path (a file) or "
                "private_key_env (the name of an environment variable)"
            )
        return self
