"""Arrows point one way: a module imports only from the folders that its own may know, and some know no Ray."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    folder: set(names.split())
    for folder, names in {
        "storage": "",
        "config": "storage",
        "text": "",
        "runtime": "config storage",
        "model": "",
        "objectives": "config model",
        "sources": "config runtime text storage",
        "data": "config runtime text sources storage",
        "embedding": "config runtime data model text export storage",
        "evaluation": "config runtime data model text embedding storage",
        "mining": "config runtime data model text embedding storage",
        "training": "config runtime data model objectives evaluation storage",
        "export": "config runtime data model storage",
        "preflight": "config runtime data embedding training tuning storage",
        "tuning": "config runtime data training storage",
        "cleaning": "config runtime data model embedding storage",
        "stages": "config runtime data model embedding evaluation mining training storage preflight tuning",
    }.items()
}
WITHOUT_RAY = {"config", "storage", "text", "sources", "model", "objectives", "export", "cleaning"}
WITHOUT_TORCH = {"config", "storage", "text", "runtime", "sources", "data", "cleaning"}
RAYLESS_MODULES = {
    f"{folder}/{name}.py"
    for folder, names in {
        "training": "assembly loop reducer saving strategy step build validation checkpoints fsdp sharded uploading",
        "embedding": "chunks documents indexing nearest search store sync table",
        "mining": "blocks choosing",
        "tuning": "space study sweep",
    }.items()
    for name in names.split()
}


def modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def faults(path: Path) -> Iterator[str]:
    """What a module imports and may not."""
    inside = path.relative_to(ROOT / "pipeline")
    own, found = inside.parts[0].removesuffix(".py"), set(imports(path))
    if own == "__init__":
        yield from found
        return
    packages = {name.split(".")[0] for name in found}
    without_ray = own in WITHOUT_RAY or str(inside) in RAYLESS_MODULES or "stores" in inside.parts
    yield from {name.split(".")[1] for name in found if name.startswith("pipeline.")} - MAY_IMPORT[own] - {own}
    yield from packages & {"jobs", "tests", "benchmarks", *(["ray"] if without_ray else [])}
    yield from packages & {"torch"} if own in WITHOUT_TORCH else ()
    yield from found & {"pipeline"}  # `from pipeline import x` would hide the folder that x is in


def test_imports() -> None:
    found = {str(path.relative_to(ROOT)): sorted(faults(path)) for path in modules()}
    assert not {path: names for path, names in found.items() if names}
    assert {str(path.relative_to(ROOT / "pipeline")) for path in modules()} >= RAYLESS_MODULES


def test_only_storage_asks_where_a_path_lies() -> None:
    asking = re.compile(
        r"isinstance\([^)]*\b(Path|BucketPath)\b|pyarrow\.fs|import obstore|urlparse|\.startswith\(.(s3|gs|az):"
    )
    found = [path for path in modules() if path.parent.name != "storage" and asking.search(path.read_text("utf-8"))]
    assert not found


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, needs in MAY_IMPORT.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_files_are_of_a_size_to_read() -> None:
    for path in [*modules(), *(ROOT / "jobs").glob("*.py")]:
        assert len(path.read_text("utf-8").splitlines()) <= (130 if path.parent.name == "jobs" else 500), path
