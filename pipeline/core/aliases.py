"""Names for models, such as `production`, in the way of MLflow's aliases: `embedding.model=models:/production`.

    assign_alias(root, "production", {"run": "pairs", "model": "models/3f9c2a…"})
    read_alias(root, "production")["model"]          # models/3f9c2a…, a folder below the root

Each name is one file, `<root>/aliases/<name>.json`, which one atomic write replaces. Several writers need no lock: the
last one wins, and a reader sees what one of them wrote.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from pipeline.core.files import sorted_glob, write_atomically
from pipeline.core.path import StoragePath

SCHEME = "models:/"


def assign_alias(root: StoragePath, name: str, content: dict[str, Any]) -> None:
    """Give a model the name; another model that had it loses it."""
    write_atomically(_folder(root) / f"{name}.json", json.dumps(content, indent=2).encode())


def read_aliases(root: StoragePath) -> dict[str, dict[str, Any]]:
    """All names, and what `assign_alias` wrote for each."""
    return {file.stem: json.loads(file.read_text()) for file in sorted_glob(_folder(root), "*.json")}


def aliased_model(root: StoragePath, uri: str) -> StoragePath:
    """The folder of the model that `models:/NAME` names. Raises KeyError with a sentence if there is no such name."""
    name, known = uri.removeprefix(SCHEME), read_aliases(root)
    if name in known:
        return root / known[name]["model"]
    near = difflib.get_close_matches(name, known, 1)
    names = f"the names are {', '.join(known)}" if known else "no model has a name yet"
    meant = f"did you mean {SCHEME}{near[0]}?" if near else f"{names}; tep runs promote RUN {name or 'NAME'} gives it"
    raise KeyError(f"found no model named {name!r} below {root}; {meant}")


def _folder(root: StoragePath) -> StoragePath:
    return root / "aliases"
