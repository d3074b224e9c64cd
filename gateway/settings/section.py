"""The base of all sections of the settings: strict, immutable, and with cleaned values."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SecretStr,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from gateway.settings.secret_text import clean_setting


class Section(BaseModel):
    """A section of the settings. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _clean(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        # pydantic would convert true to 1.
        if isinstance(value, bool) and annotation in {int, float}:
            raise PydanticCustomError("number", "must be a number")
        return clean_setting(value, handler, is_secret=annotation is SecretStr)
