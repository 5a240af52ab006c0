"""List the config's keys with type, default and docs, or explain one key or section.

examples:
  tep config                                     # all keys
  tep config training                            # the keys of a section, with all that is known of each
  tep config training.learning_rate
  tep config training --config fine_tune         # and the values that a config sets
  tep config --json                              # [{key, type, required, default, docs}], as when piped
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from pydantic_core import to_jsonable_python

from pipeline.config import Config
from pipeline.config.reference import Key, find_keys, written
from pipeline.core.console import table
from pipeline.core.outcome import Result
from pipeline.job import DEFAULT_CONFIG, parser


def arguments() -> argparse.ArgumentParser:
    own = parser("config", __doc__ or "", names="KEY", prepares=False)
    own.set_defaults(logs=False)
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    found = list({key.key: key for name in args.names or [""] for key in find_keys(name)}.values())
    values = {} if args.config == str(DEFAULT_CONFIG) and not args.overrides else _values(found, config)
    if args.json or not sys.stdout.isatty():
        return Result(reply=[{**asdict(key), **({"value": values[key.key]} if values else {})} for key in found])
    width = shutil.get_terminal_size((120, 24)).columns
    print(explained(found, values, width) if args.names else listed(found, values, width))
    return Result({"keys": len(found)}, summary="")


def _values(keys: Sequence[Key], config: Config) -> dict[str, object]:
    """The values that a config has; null for the keys in lists, and in sections that are null."""
    values: dict[str, object] = {}
    for key in keys:
        try:
            value = config.get(key.key)
        except KeyError:
            value = None
        values[key.key] = to_jsonable_python(value)
    return values


def listed(keys: Sequence[Key], values: dict[str, object], width: int) -> str:
    """A line a key: its default or value, and how its docs begin."""
    rows = [
        (key.key, _short(written(values[key.key]) if values else key.shown_default), key.docs)
        for key in keys
        if key.type != "mapping"
    ]
    lines = table(rows, ("key", "value" if values else "default", "what it does")).splitlines()
    return "\n".join([*(line[:width] for line in lines), "", "tep config KEY explains a key or a section"])


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def explained(keys: Sequence[Key], values: dict[str, object], width: int) -> str:
    """All that is known of each key."""
    blocks = []
    for key in keys:
        facts = f"{key.type}; required" if key.required else f"{key.type}; default: {key.shown_default}"
        if key.type == "mapping":
            facts = key.type
        elif values:
            facts += f"; here: {written(values[key.key])}"
        text = [facts, *([key.docs] if key.docs else [])]
        wrapped = [textwrap.fill(each, width, initial_indent="    ", subsequent_indent="    ") for each in text]
        blocks.append("\n".join([key.key, *wrapped]))
    return "\n".join(blocks)
