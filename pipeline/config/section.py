"""The base class and the types of the config's sections."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expand(path: str) -> str:
    expanded = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$\{?(\w+)\}?", expanded):
        raise ValueError(f"a path whose environment variables are set ({unset[1]} is not)")
    return expanded


PathStr = Annotated[str, Field(min_length=1), AfterValidator(_expand)]
"""A path in which `~` and `$VARIABLES` are expanded; an unset variable is an error."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$", max_length=128)]
"""Names separated by `/`: a run, or a run nested in another."""

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
