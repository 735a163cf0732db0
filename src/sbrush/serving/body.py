"""What all requests with a body have in common."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, model_validator

from sbrush.console import is_text


class Body(BaseModel):
    """A JSON object whose texts are texts: JSON can write half a character, which no file and no answer can hold."""

    @model_validator(mode="after")
    def check_texts(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and not is_text(value):
                raise ValueError(f"{name} is not text")
        return self
