"""What all sections of a recipe share."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gisp_tasks.errors import InputError
from gisp_tasks.recipe.reading import describe_errors


class Section(BaseModel):
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
