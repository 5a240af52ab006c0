"""The config's keys with their types, defaults and docs, read from the tree of classes.

(key,) = find_keys("training.learning_rate")
key.type, key.default, key.docs          # ('number > 0', 0.001, 'Peak learning rate …')
find_keys("training")                    # all keys of the section
find_keys("lr")                          # ConfigError: found no key lr; did you mean training.learning_rate?
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from pipeline.config.reading import inner_section, meant_keys
from pipeline.config.section import PathStr
from pipeline.config.tree import Config
from pipeline.core.outcome import ConfigError

_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
    Any: "any value",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_PATH = get_args(PathStr)[-1]


@dataclass(frozen=True)
class Key:
    """A key of the config. `default` is a plain value, and `required` says that there is none."""

    key: str
    type: str
    required: bool
    default: Any
    docs: str

    @property
    def shown_default(self) -> str:
        """The default as it is written in YAML."""
        return "required" if self.required else written(self.default)


def written(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    if isinstance(value, float):
        return re.sub(r"e([-+])0+", r"e\1", f"{value:g}").replace("e+", "e")
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key, in the order of the classes; the key of a section comes before those in it."""
    for name, field in section.model_fields.items():
        inner, is_list = inner_section(field.annotation), get_origin(field.annotation) is list
        default = None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        docs = " ".join((field.description or (inner.__doc__ if inner else None) or "").split())
        yield Key(f"{prefix}{name}", _described(field.annotation, field.metadata), field.is_required(), default, docs)
        if inner:
            yield from all_keys(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def find_keys(name: str = "") -> list[Key]:
    """The key of that name and those in it; all keys for "". Raises ConfigError for an unknown name."""
    known, wanted = list(all_keys()), _bare(name)
    found = [key for key in known if not wanted or f"{_bare(key.key)}.".startswith(f"{wanted}.")]
    if not found:
        names, sections = [key.key for key in known], [*Config.model_fields]
        near = difflib.get_close_matches(name, sections, 1, 0.8) or meant_keys(name, Config)
        near = near or difflib.get_close_matches(name, names, 3)
        meant = f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(sections)}"
        raise ConfigError(f"found no key {name} in the config; {meant}")
    return found


def complete_override(prefix: str, **_: Any) -> list[str]:
    """What `section.key=value` may be that begins with the prefix: keys, then the values of a key that has a few."""
    name, equals, _value = prefix.partition("=")
    if not equals:
        return [f"{key.key.replace('[]', '.0')}=" for key in all_keys() if key.type != "mapping"]
    types = [key.type for key in all_keys() if _bare(key.key) == _bare(name)]
    values = re.split(r" \| | or ", types[0]) if types else []
    return [f"{name}={value}" for value in values if re.fullmatch(r"[a-z]\w*", value) and value not in _NAMES.values()]


def _bare(name: str) -> str:
    """A key without the places in lists: data.sources.0.path and data.sources[].path are data.sources.path."""
    return re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", name)


def _described(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds: `auto or integer ≥ 1`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _described(args[0], [*_flat(args[1:]), *constraints])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_described(arg, () if arg is NoneType else constraints) for arg in args))
    if origin is Literal:
        return " | ".join(written(arg) for arg in args)
    if origin is list:
        return f"list of {_described(args[0])}"
    if origin is dict:
        return f"mapping of {_described(args[0])} to {_described(args[1])}"
    if inner_section(annotation):
        return "mapping"
    if any(isinstance(each, AfterValidator) and each == _PATH for each in constraints):
        return "path"
    bounds = [
        f"{sign} {written(getattr(each, name))}"
        for each in constraints
        for name, sign in _BOUNDS.items()
        if getattr(each, name, None) is not None
    ]
    return f"{_NAMES.get(annotation, str(annotation))} {', '.join(bounds)}".strip()


def _flat(constraints: Sequence[Any]) -> list[Any]:
    """The constraints of an annotation; those that pydantic's Field holds stand in its metadata."""
    return [part for each in constraints for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
