"""A DeepSpeed JSON file as keys of our own: `training.deepspeed_config: ds.json`.

    rows = apply_deepspeed(tree, arguments=["training.learning_rate"])
    tree["training"]["strategy"]        # "fsdp", of {"zero_optimization": {"stage": 2}}
    rows[0]                             # Row("zero_optimization.stage", "2", "training.strategy=fsdp", "fsdp shards …")

Its values take the place of those in the YAML; `section.key=value` arguments beat it. "auto" keeps our own value, as
transformers' Trainer does. A key that only tunes speed, memory or printing is listed as not needed, and one without a
counterpart is refused by name (`deepspeed_keys` has them all). What is kept is the mathematics of the training, and
nothing of DeepSpeed itself is needed for it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import TypeAdapter, ValidationError

from pipeline.config import deepspeed_keys as keys
from pipeline.config.deepspeed_batch import batch_parts
from pipeline.config.reading import ConfigError, kind_of
from pipeline.config.section import PathStr

AUTO = "auto"
SWITCH = {True: True, False: False, AUTO: AUTO}


class Row(NamedTuple):
    """What became of one key."""

    key: str
    """DeepSpeed's, with dots."""
    value: str
    """As JSON; "" where the file lacks the key and DeepSpeed's default counts."""
    became: str
    """`section.key=value`, or ""."""
    note: str


HEADER = ("DeepSpeed", "value", "became", "note")


def apply_deepspeed(tree: dict[str, Any], arguments: Sequence[str] = ()) -> list[Row]:
    """Put the settings of `training.deepspeed_config` into the tree, but for the keys among `arguments`.

    Returns what became of each key, in the file's order; [] where there is no file. Raises ConfigError for a file that
    is no JSON object, and for a key or a value without a counterpart. What else the tree holds, and the ranges of
    values, are left to the tree's own validation; `origin` helps it to say where a value is from.
    """
    training = tree.get("training")
    name = training.get("deepspeed_config") if isinstance(training, dict) else None
    try:
        file = Path(TypeAdapter(PathStr).validate_python(name, strict=True))
    except ValidationError:
        return []
    return _Translation(file, _read(file), tree, arguments).rows_in_order()


def origin(rows: Sequence[Row], config: Path, deepspeed: str, location: Sequence[int | str]) -> Path:
    """Which file, and which key in it, a refused value is from; `location` is pydantic's."""
    ours = ".".join(str(part) for part in location[:2])
    theirs = [row.key for row in rows if row.became.startswith(f"{ours}=")]
    if theirs:
        return Path(f"{deepspeed} ({theirs[-1]})")
    mixed = len(location) == 1 and any(row.became.startswith(f"{ours}.") for row in rows)
    return Path(f"{config} with {deepspeed}") if mixed else config


def _read(file: Path) -> dict[str, Any]:
    """The file's keys, with dots, and their values; a feature of `NO_COUNTERPART` stays whole."""
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_once, parse_constant=_no_number)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; allowed is a readable DeepSpeed JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {error}; allowed is a DeepSpeed JSON file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: found {kind_of(content)}; allowed is a JSON object of DeepSpeed's keys")
    return _flat(content)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _flat(content: Mapping[str, Any], block: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        key = block + name
        whole = not isinstance(value, dict) or key in keys.NO_COUNTERPART
        leaves |= {key: value} if whole else _flat(value, f"{key}.")
    return leaves


class _Translation:
    """From the file's keys to ours in the tree, a row each."""

    def __init__(self, file: Path, given: dict[str, Any], tree: dict[str, Any], arguments: Sequence[str]) -> None:
        self.file, self.given, self.tree, self.arguments = file, given, tree, arguments
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
                self._note(
                    "scheduler.params.warmup_type", "DeepSpeed's default is log; here the rate rises along a line"
                )
            self._defaults(self.given[keys.SCHEDULE])

    def _defaults(self, block: str) -> None:
        """DeepSpeed's, where neither its file nor the tree has a value."""
        for key, value in keys.DEFAULTS[block].items():
            ours, _ = keys.DIRECT[key]
            if key not in self.given and self._ours(ours) is None:
                self._put(key, ours, value, "DeepSpeed's default")

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
        """The one that is on; our own where one is auto; fp32 where those that stand there are off."""
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
                self._put(key, "model.gradient_checkpointing", on, "activations are computed again, in every layer")
            elif key in self.given:
                self._note(key, "off")

    def _trackers(self) -> None:
        for key, tracker in keys.TRACKERS.items():
            if key in self.given and self._choice(key, SWITCH) is True:
                ours = self._ours("logging.trackers") or []
                if isinstance(ours, list):  # else validation names it
                    self._put(key, "logging.trackers", ours if tracker in ours else [*ours, tracker])
            elif key in self.given:
                self._note(key, "off")

    def _compression(self) -> None:
        if keys.COMMUNICATION in self.given:
            kind = self._choice(keys.COMMUNICATION, {**keys.COMPRESSIONS, None: AUTO, AUTO: AUTO})
            self._put(keys.COMMUNICATION, "training.gradient_compression", kind)

    def _batch(self) -> None:
        """Where an argument sets the batch or the steps, the file's micro-batch gives way to what follows from it."""
        ours = {keys.BATCH: "training.global_batch_size", keys.STEPS: f"training.{keys.STEPS}"}
        batch, steps, micro = (self._count(key) for key in (*ours, keys.MICRO))
        if any(self._is_argument(key) for key in ours.values()):
            micro = None
        steps = steps or _number(self._ours(ours[keys.STEPS]))
        try:
            batch, steps, found = batch_parts(batch, micro, steps, _bounds(self._ours("scaling.num_workers")))
        except ValueError as error:
            raise ConfigError(f"{self.file}: {error}") from None
        for key, value in ((keys.BATCH, batch), (keys.STEPS, steps)):
            if key in self.given or value not in (None, self._ours(ours[key])):
                self._put(key, ours[key], value)
        if found:
            self._put(keys.MICRO, "scaling.num_workers", found, f"{batch} = {micro} x {steps} x {found} workers")
        elif keys.MICRO in self.given:
            self._note(keys.MICRO, "what the global batch, the steps and the workers leave")

    def _others(self) -> None:
        done = {row.key for row in self.rows}
        for key in [key for key in self.given if key not in done]:
            self._other(key, self.given[key])

    def _other(self, key: str, value: Any) -> None:
        """A key that sets nothing."""
        if key in keys.NOT_NEEDED:
            return self._note(key, f"not needed: {keys.NOT_NEEDED[key]}")
        if key in keys.FIXED:
            allowed, why = keys.FIXED[key]
            if value not in (*allowed, AUTO):
                self._refuse(key, f"{_shown(allowed[0])}: {why}")
            return self._note(key, f"as here: {why}")
        if key in keys.NO_COUNTERPART:
            if not _is_off(value):
                self._refuse(key, "enabled: false, or no such key: it has no counterpart here")
            return self._note(key, "off")
        if key in keys.BLOCKS and value is None:
            return self._note(key, "off")
        if key in keys.BLOCKS:
            self._refuse(key, "a mapping of keys")
        near = difflib.get_close_matches(key, keys.KNOWN, 1, 0.8)
        hint = f"did you mean {near[0]}?" if near else "it has no counterpart here"
        raise ConfigError(f"{self.file}: {key}: unknown key; {hint}")

    def _ours(self, key: str) -> Any:
        """The tree's own value, None where it has none."""
        section, name = key.split(".")
        place = self.tree.get(section)
        return place.get(name) if isinstance(place, dict) else None

    def _is_argument(self, ours: str) -> bool:
        return any(argument == ours or argument.startswith(f"{ours}.") for argument in self.arguments)

    def _put(self, key: str, ours: str, value: Any, note: str = "") -> None:
        """Set our key, but where an argument does. Without a value, ours stays."""
        if self._is_argument(ours):
            return self._note(key, f"the argument {ours} beats it")
        if value is None or value == AUTO:
            return self._note(key, f"{ours} stays as it is")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has 2e3 for 2000
        section, name = ours.split(".")
        place = self.tree.setdefault(section, {})
        if not isinstance(place, dict):  # validation names it
            return self._note(key, note)
        place[name] = value
        return self._note(key, note, f"{ours}={_shown(value)}")

    def _note(self, key: str, note: str, became: str = "") -> None:
        self.rows.append(Row(key, _shown(self.given[key]) if key in self.given else "", became, note))

    def _choice(self, key: str, choices: Mapping[Any, Any]) -> Any:
        """What a value stands for. JSON's true is not 1 here, as it is in Python."""
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
        found = kind_of(self.given[key]) if key in self.given else "no such key"
        raise ConfigError(f"{self.file}: {key}: found {found}; allowed is {allowed}")


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bounds(workers: Any) -> tuple[int, int] | None:
    """The fewest and the most of `scaling.num_workers`; None for auto."""
    fewest, most = workers if isinstance(workers, list) and len(workers) == 2 else (workers, workers)
    return (fewest, most) if _number(fewest) and _number(most) else None


def _is_off(value: Any) -> bool:
    return not value or value == AUTO or (isinstance(value, dict) and value.get("enabled", True) in (False, None, AUTO))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
