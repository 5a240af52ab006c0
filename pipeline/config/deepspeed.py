"""Converts a DeepSpeed JSON file to a config, once: `python jobs/from_deepspeed.py ds.json > config.yaml`.

    {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}

becomes, below a table that shows how each key was converted,

    training:
      strategy: fsdp

"auto" keeps our default, as in transformers' Trainer. Keys that only tune speed, memory or printing are listed as not
needed; a key without a counterpart is an error (`deepspeed_keys` lists them all). DeepSpeed need not be installed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from pydantic import ValidationError

from pipeline.config import deepspeed_keys as keys
from pipeline.config.reading import explain, kind_of
from pipeline.config.tree import Config
from pipeline.core.outcome import ConfigError

AUTO = "auto"
SWITCH = {True: True, False: False, AUTO: AUTO}


class Row(NamedTuple):
    """How one key was converted."""

    key: str
    """DeepSpeed's dotted key."""
    value: str
    """Value in the file; "" if the file lacks the key and DeepSpeed's default applies."""
    became: str
    """`section.key=value`, or ""."""
    note: str


def to_yaml(file: Path) -> str:
    """Our config as YAML, after a table in comments that shows how each key was converted. Raises ConfigError."""
    tree, rows = convert(file)
    table = [Row("DeepSpeed", "value", "became", "note"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    return "".join(f"# {line}\n" for line in lines) + "\n" + yaml.safe_dump(tree, sort_keys=False)


def convert(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return our keys by section, and a row for each of DeepSpeed's keys in the file's order.

    Raises ConfigError if the file is not a JSON object, if a key or value has no counterpart, or if our config does
    not allow a value.
    """
    conversion = _Conversion(file, _read(file))
    rows = conversion.rows_in_order()
    try:
        Config.model_validate(conversion.tree)
    except ValidationError as error:
        ours = ".".join(map(str, error.errors()[0]["loc"][:2]))
        theirs = [row.key for row in rows if row.became.startswith(f"{ours}=")]
        where = Path(f"{file} ({theirs[-1]})") if theirs else file
        raise ConfigError(explain(error, where, Config)) from None
    return conversion.tree, rows


def _read(file: Path) -> dict[str, Any]:
    """Dotted key → value. Blocks in `NO_COUNTERPART` are not flattened."""
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_without_duplicates, parse_constant=_reject_constant)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; allowed is a readable DeepSpeed JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {error}; allowed is a DeepSpeed JSON file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: found {kind_of(content)}; allowed is a JSON object of DeepSpeed's keys")
    return _flatten(content)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return content


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _flatten(content: Mapping[str, Any], block: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        key = block + name
        is_leaf = not isinstance(value, dict) or key in keys.NO_COUNTERPART
        leaves |= {key: value} if is_leaf else _flatten(value, f"{key}.")
    return leaves


class _Conversion:
    """Converts the file's keys to our tree, and records a row for each."""

    def __init__(self, file: Path, given: dict[str, Any]) -> None:
        self.file, self.given = file, given
        self.tree: dict[str, dict[str, Any]] = {}
        self.rows: list[Row] = []

    def rows_in_order(self) -> list[Row]:
        for part in (self._optimizer, self._schedule, self._direct, self._strategy, self._precision):
            part()
        for part in (self._recomputing, self._trackers, self._compression, self._batch, self._others):
            part()
        places = {key: place for place, key in enumerate(self.given)}
        return sorted(self.rows, key=lambda row: places.get(row.key, len(places)))

    def _optimizer(self) -> None:
        if any(key.startswith("optimizer.") for key in self.given):
            self._note(keys.OPTIMIZER, f"{self._choice(keys.OPTIMIZER, keys.OPTIMIZERS)}: decay is decoupled")
            self._defaults("optimizer")

    def _schedule(self) -> None:
        if any(key.startswith("scheduler.") for key in self.given):
            shape = self._choice(keys.SCHEDULE, keys.SCHEDULES)
            self._put(keys.SCHEDULE, "training.schedule", shape)
            if shape == "linear":
                self._put(keys.SCHEDULE, "training.final_rate_fraction", 0)
            if "scheduler.params.warmup_type" not in self.given:
                self._note("scheduler.params.warmup_type", "DeepSpeed's default is log; here the warm-up is linear")
            self._defaults(self.given[keys.SCHEDULE])

    def _defaults(self, block: str) -> None:
        """Set DeepSpeed's defaults for keys that the file lacks."""
        for key, value in keys.DEFAULTS[block].items():
            if key not in self.given:
                self._put(key, keys.DIRECT[key][0], value, "DeepSpeed's default")

    def _direct(self) -> None:
        rate, peak = (self.given.get(key) for key in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"))
        if rate not in (None, AUTO, peak) and peak not in (None, AUTO):
            self._refuse("scheduler.params.warmup_max_lr", f"auto or optimizer.params.lr, {rate}")
        for key, (ours, note) in keys.DIRECT.items():
            if key in self.given:
                self._put(key, ours, self.given[key], note)

    def _strategy(self) -> None:
        if keys.STAGE in self.given:
            strategy = self._choice(keys.STAGE, {**keys.STAGES, AUTO: AUTO})
            note = "fsdp shards weights, gradients and optimizer state, at any stage" if strategy == "fsdp" else ""
            self._put(keys.STAGE, "training.strategy", strategy, note)

    def _precision(self) -> None:
        """Use the precision that is on; keep our default if one is auto; fp32 if all listed ones are off."""
        switches = {key: self._choice(key, SWITCH) for key in keys.PRECISIONS if key in self.given}
        on = [key for key, switch in switches.items() if switch is True]
        if len(on) > 1:
            self._refuse(on[1], f"false, as {on[0]} is true")
        for key, switch in switches.items():
            if switch is False and (on or AUTO in switches.values()):
                self._note(key, "off")
            else:
                self._put(key, "training.precision", {True: keys.PRECISIONS[key], False: "fp32", AUTO: AUTO}[switch])

    def _recomputing(self) -> None:
        for key in keys.RECOMPUTING:
            value = self.given.get(key)
            if value:
                on = value if value == AUTO else True
                self._put(key, "model.gradient_checkpointing", on, "activations are recomputed in every layer")
            elif key in self.given:
                self._note(key, "off")

    def _trackers(self) -> None:
        for key, tracker in keys.TRACKERS.items():
            if key in self.given and self._choice(key, SWITCH) is True:
                others = self.tree.get("logging", {}).get("trackers", [])
                self._put(key, "logging.trackers", [*others, tracker])
            elif key in self.given:
                self._note(key, "off")

    def _compression(self) -> None:
        if keys.COMMUNICATION in self.given:
            kind = self._choice(keys.COMMUNICATION, {**keys.COMPRESSIONS, None: AUTO, AUTO: AUTO})
            self._put(keys.COMMUNICATION, "training.gradient_compression", kind)

    def _batch(self) -> None:
        """DeepSpeed's global batch is micro-batch x steps x workers; we have no key for the micro-batch."""
        batch, micro, steps = map(self._count, (keys.BATCH, keys.MICRO, keys.STEPS))
        for key, ours, count in (
            (keys.BATCH, "training.global_batch_size", batch),
            (keys.STEPS, "training.gradient_accumulation_steps", steps),
        ):
            if key in self.given:
                self._put(key, ours, count)
        if micro is None:
            if keys.MICRO in self.given:
                self._note(keys.MICRO, "follows from the global batch, the steps and the workers")
        elif batch is None or steps is None:
            self._refuse(keys.MICRO, f"auto, or a number if {keys.BATCH} and {keys.STEPS} are numbers too")
        elif batch % (micro * steps):
            self._refuse(keys.BATCH, f"{micro} x {steps} x the number of workers")
        else:
            workers = batch // (micro * steps)
            self._put(keys.MICRO, "scaling.num_workers", workers, f"{batch} = {micro} x {steps} x {workers} workers")

    def _others(self) -> None:
        done = {row.key for row in self.rows}
        for key in [key for key in self.given if key not in done]:
            self._other(key, self.given[key])

    def _other(self, key: str, value: Any) -> None:
        """Note or refuse a key that sets nothing."""
        if key in keys.NOT_NEEDED:
            return self._note(key, f"not needed: {keys.NOT_NEEDED[key]}")
        if key in keys.FIXED:
            allowed, why = keys.FIXED[key]
            if value not in (*allowed, AUTO):
                self._refuse(key, f"{_shown(allowed[0])}: {why}")
            return self._note(key, f"same as ours: {why}")
        if key in keys.NO_COUNTERPART:
            if not _is_off(value):
                self._refuse(key, "enabled: false, or leaving the key out: it has no counterpart here")
            return self._note(key, "off")
        if key in keys.BLOCKS and value is None:
            return self._note(key, "off")
        if key in keys.BLOCKS:
            self._refuse(key, "a mapping of keys")
        near = difflib.get_close_matches(key, keys.KNOWN, 1, 0.8)
        hint = f"did you mean {near[0]}?" if near else "it has no counterpart here"
        raise ConfigError(f"{self.file}: {key}: unknown key; {hint}")

    def _put(self, key: str, ours: str, value: Any, note: str = "") -> None:
        """Set our key; null and "auto" keep our default."""
        if value is None or value == AUTO:
            return self._note(key, f"{ours} keeps its default")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON may write 2000 as 2e3
        section, name = ours.split(".")
        self.tree.setdefault(section, {})[name] = value
        return self._note(key, note, f"{ours}={_shown(value)}")

    def _note(self, key: str, note: str, became: str = "") -> None:
        self.rows.append(Row(key, _shown(self.given[key]) if key in self.given else "", became, note))

    def _choice(self, key: str, choices: Mapping[Any, Any]) -> Any:
        """The meaning of the key's value. Unlike in Python, true does not equal 1."""
        value = self.given.get(key)
        for choice, meaning in choices.items():
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return meaning
        return self._refuse(key, " or ".join(_shown(choice) for choice in choices))

    def _count(self, key: str) -> int | None:
        value = self.given.get(key)
        if value is None or value == AUTO:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
            self._refuse(key, "a whole number from 1 on, or auto")
        return int(value)

    def _refuse(self, key: str, allowed: str) -> NoReturn:
        found = kind_of(self.given[key]) if key in self.given else "nothing"
        raise ConfigError(f"{self.file}: {key}: found {found}; allowed is {allowed}")


def _is_off(value: Any) -> bool:
    return not value or value == AUTO or (isinstance(value, dict) and value.get("enabled", True) in (False, None, AUTO))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
