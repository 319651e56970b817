"""Numbers that make sense only in a range, one alias each: `heads: Count | None = None` in a spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]  # how many there are, or how wide
Natural = Annotated[int, Field(ge=0)]  # how many, possibly none
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]  # of a whole
Chance = Annotated[float, Field(ge=0, lt=1)]  # a rate of dropout
