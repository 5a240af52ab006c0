"""Read a config's YAML and explain its errors in one sentence, for any tree of pydantic models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.core.outcome import ConfigError

OTHER_NAMES = {
    "mixed_precision": "training.precision",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "per_device_train_batch_size": "training.global_batch_size",
    "epochs": "training.max_epochs",
    "num_epochs": "training.max_epochs",
    "num_train_epochs": "training.max_epochs",
    "steps": "training.max_steps",
    "num_steps": "training.max_steps",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_fraction",
    "gradient_clipping": "training.max_grad_norm",
    "torch_compile": "training.compile",
    "max_seq_length": "tokenizer.max_length",
    "model_name_or_path": "model.pretrained",
    "base_model": "model.pretrained",
    "embedding_dim": "model.d_model",
    "hidden_size": "model.d_model",
    "save_total_limit": "checkpointing.max_checkpoints",
    "save_steps": "checkpointing.every_steps",
    "eval_steps": "training.validate_every_steps",
    "logging_steps": "training.log_every_steps",
    "report_to": "logging.trackers",
    "output_dir": "storage.root",
    "run_name": "storage.run",
    "workers": "scaling.num_workers",
}
"""Names in other libraries → our key, for error messages."""


ALLOWED_ARGUMENTS = "allowed are section.key=value and the options that --help lists"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as in YAML 1.2, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; allowed is YAML text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; allowed is a readable YAML file") from None
    return _mapping(text, str(file))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors raise many exception types
        raise ConfigError(f"{where}: {_yaml_problem(error)}; allowed is plain YAML") from None
    if tree is None:
        raise ConfigError(f"{where}: found an empty file; allowed is a mapping of sections such as `training: {{}}`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: found {kind_of(tree)}; allowed is a mapping of sections such as `training: {{}}`")
    return tree


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = (
        getattr(error, "problem", None)
        or getattr(error, "reason", None)
        or f"{type(error).__name__} {error}".splitlines()[0]
    )
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f"not YAML: {problem}"


def parse_override(override: str, root: type[BaseModel]) -> tuple[str, Any]:
    """Parse `section.key=value`; the value is YAML. Raises ConfigError, with the key that was probably meant."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", key):
        raise ConfigError(f"argument {override!r}: {meant_override(key, text, root) or ALLOWED_ARGUMENTS}")
    try:
        return key, yaml.load(text, _Loader)
    except Exception as error:
        raise ConfigError(f"argument {override!r}: {_yaml_problem(error)}; allowed is a YAML value") from None


def meant_override(name: str, value: str, root: type[BaseModel]) -> str:
    """Suggest `section.key=value` for a name such as `lr`, `--max-steps` or `--training.max_steps`; "" if none fits."""
    found = meant_keys(name.lstrip("-").replace("-", "_"), root)
    return "use " + " or ".join(f"{key}={value or 'VALUE'}" for key in found) if found else ""


def meant_keys(name: str, root: type[BaseModel]) -> list[str]:
    """The dotted keys that a name may mean: the key, another library's name for it, or the end of one or more keys."""
    leaf = name.rpartition(".")[2].lower()
    keys = [path.replace("[]", ".0") for path in paths(root) if "." in path]
    if name in keys:
        return [name]
    if leaf in OTHER_NAMES:
        return [OTHER_NAMES[leaf]]
    leaves = {key.rpartition(".")[2] for key in keys}
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, sorted(leaves), 1, 0.8)
    return [key for key in keys if key.rpartition(".")[2] in near]


def explain(
    error: ValidationError, file: Path | str, root: type[BaseModel], arguments: Mapping[str, str] | None = None
) -> str:
    """The first error as one sentence, and the number of others. `root` is the class of the whole tree.

    `arguments`: the part of the tree that an argument has added or changed → the argument's key.
    """
    details = error.errors(include_url=False)
    first = details[0]
    location = [part for part in first["loc"][:-1] if not _is_union_tag(part)]
    if first["type"] == "extra_forbidden" or not _is_union_tag(first["loc"][-1]):
        location.append(first["loc"][-1])
    key = ".".join(str(part) for part in location)
    where = f"{file}: {key}"
    for part, argument in (arguments or {}).items():
        if f"{key}.".startswith(f"{part}."):
            where = f"argument {key}" if f"{key}.".startswith(f"{argument}.") else f"argument {argument}: {key}"
    places = {tuple(p for p in d["loc"] if not _is_union_tag(p)) for d in details}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggest(location, root)}{more}"
    if first["type"] == "missing":
        return f"{where}: missing key; set a value{more}"
    allowed = " or ".join(
        dict.fromkeys(_allowed(d) for d in details if [p for p in d["loc"] if not _is_union_tag(p)] == location)
    )
    return f"{where}: found {kind_of(first['input'])}; allowed is {allowed}{more}"


def _is_union_tag(part: object) -> bool:
    """Pydantic puts members of unions, constraints and keys of mappings into an error's location."""
    return isinstance(part, str) and bool(re.search(r"[\[(]|^(int|float|str|bool|none)$", part))


_PREFIXES = {
    "Input should be ": "",
    "Value error, ": "",
    "String should have ": "text with ",
    "String should ": "text that should ",
    "List should have ": "a list with ",
}


def _allowed(detail: Any) -> str:
    message = str(detail["msg"])
    for prefix, instead in _PREFIXES.items():
        if message.startswith(prefix):
            message = instead + message.removeprefix(prefix)
    if detail["type"] == "model_type":
        message = "a mapping of keys"
    return message[0].lower() + message[1:]


def kind_of(value: Any) -> str:
    """The value, shortened, with its type: `3.5`, `'abc' (text)`, `null`."""
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value"}
    if value is None:
        return "null"
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({names[type(value)]})" if type(value) in names else shown


def _suggest(location: Sequence[Any], root: type[BaseModel]) -> str:
    """The nearest key: another library's name for it, the same name in another section, or a similar spelling."""
    unknown, parent = str(location[-1]), [p for p in location[:-1] if not isinstance(p, int)]
    elsewhere = [p for p in paths(root) if "." in p and p.split(".")[-1].removesuffix("[]") == unknown]
    if unknown in OTHER_NAMES:
        return f"use {OTHER_NAMES[unknown]}"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    section: Any = root
    for part in parent:
        if hasattr(section, "model_fields") and part in section.model_fields:  # else a user-defined key
            section = inner_section(section.model_fields[part].annotation)
    known = list(section.model_fields) if hasattr(section, "model_fields") else []
    near = difflib.get_close_matches(unknown, known, 1) or difflib.get_close_matches(unknown, _leaves(root), 1, 0.8)
    return f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known) or 'no keys'}"


def inner_section(annotation: Any) -> Any:
    """The section inside `X`, `list[X]`, `dict[str, X]` or `X | None`, else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, dict, Union, UnionType, Annotated):
        return next((inner for arg in get_args(annotation) if (inner := inner_section(arg))), None)
    return None


def paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a tree, sections too; `[]` follows a list of sections."""
    for name, field in section.model_fields.items():
        inner = inner_section(field.annotation)
        many = "[]" if get_origin(field.annotation) is list and inner else ""
        yield f"{prefix}{name}{many}"
        if inner:
            yield from paths(inner, f"{prefix}{name}{many}.")


def _leaves(root: type[BaseModel]) -> list[str]:
    return [path.split(".")[-1] for path in paths(root)]


def assign(tree: dict[str, Any], parts: list[str], value: Any, where: str) -> None:
    """Set the value at a key path; a number selects an item of an existing list. `where` begins the error message."""
    place: Any = tree
    for depth, part in enumerate(parts):
        key: str | int = part
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            key = int(part)
        elif not isinstance(place, dict):
            holder = ".".join(parts[:depth])
            raise ConfigError(f"{where}: found {kind_of(place)} in {holder}; allowed is an existing key")
        if depth == len(parts) - 1:
            place[key] = value
        else:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
