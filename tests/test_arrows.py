"""Arrows point one way: a module imports only from the folders that its own may know, and some know no Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "storage": set(),
    "config": {"storage"},
    "text": set(),
    "runtime": {"config", "storage"},
    "model": set(),
    "objectives": {"config", "model"},
    "sources": {"config", "runtime", "text", "storage"},
    "data": {"config", "runtime", "text", "sources", "storage"},
    "embedding": {"config", "runtime", "data", "model", "text", "export", "storage"},
    "evaluation": {"config", "runtime", "data", "model", "text", "embedding", "storage"},
    "mining": {"config", "runtime", "data", "model", "text", "embedding", "storage"},
    "training": {"config", "runtime", "data", "model", "objectives", "evaluation", "storage"},
    "export": {"config", "runtime", "data", "model", "storage"},
    "preflight": {"config", "runtime", "data", "embedding", "training", "tuning", "storage"},
    "tuning": {"config", "runtime", "data", "training", "storage"},
    "stages": {
        *("config", "runtime", "data", "model", "embedding", "evaluation", "mining", "training", "storage"),
        *("preflight", "tuning"),
    },
}
WITHOUT_RAY = {"config", "storage", "text", "sources", "model", "objectives", "export"}
WITHOUT_TORCH = {"config", "storage", "text", "runtime", "sources", "data"}
RAYLESS_MODULES = {
    "training/assembly.py",
    "training/loop.py",
    "training/reducer.py",
    "training/saving.py",
    "training/strategy.py",
    "training/step.py",
    "training/build.py",
    "training/validation.py",
    "training/checkpoints.py",
    "training/fsdp.py",
    "training/sharded.py",
    "embedding/nearest.py",
    "training/uploading.py",
    "embedding/store.py",
    "embedding/sync.py",
    "embedding/verify.py",
    *(f"embedding/stores/{path.name}" for path in (ROOT / "pipeline/embedding/stores").glob("*.py")),
    "mining/blocks.py",
    *(f"tuning/{name}.py" for name in ("journal", "pictures", "report", "slots", "space", "sweep", "terms")),
    "mining/choosing.py",
}


def modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(path: Path) -> str:
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    own, found = room(path), list(imports(path))
    if own == "__init__":
        assert not found
        return
    ours = {name.split(".")[1] for name in found if name.startswith("pipeline.")}
    assert ours <= MAY_IMPORT[own] | {own}
    packages = {name.split(".")[0] for name in found}
    if own in WITHOUT_RAY or str(path.relative_to(ROOT / "pipeline")) in RAYLESS_MODULES:
        assert "ray" not in packages
    if own in WITHOUT_TORCH:
        assert "torch" not in packages
    assert packages.isdisjoint({"jobs", "tests", "benchmarks"})
    assert "pipeline" not in found  # `from pipeline import x` would hide the room that x is in


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, needs in MAY_IMPORT.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_files_are_of_a_size_to_read() -> None:
    for path in [*modules(), *(ROOT / "jobs").glob("*.py")]:
        assert len(path.read_text("utf-8").splitlines()) <= (130 if path.parent.name == "jobs" else 500), path
