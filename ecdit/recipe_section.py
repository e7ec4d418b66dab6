"""What the sections of a recipe are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
FOLDER_NAME = r"^\w[\w.-]{0,199}$"  # neither . nor .., nor longer than file systems take


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about names, types, and that numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
