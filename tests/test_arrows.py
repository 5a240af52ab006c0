"""Arrows point one way: a module imports only from the folders that its own may know, and some know no Ray."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pipeline

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    room: set(names.split())
    for room, names in {
        "core": "",
        "config": "core",
        "data": "config core",
        "model": "config core",
        "index": "config core data model",
        "training": "config core data model",
        "evaluation": "config core data model index",
        "report": "config core data index training evaluation",
        "job": "config core",
        "preflight": "config core data model index training",
        "api": "config core evaluation report stages",
        "stages": "config core data model index training evaluation preflight",
        "commands": "config core data model index training evaluation report stages api job",
    }.items()
}
WITHOUT_RAY = {"config", "model"}
WITHOUT_TORCH = {"config", "core", "data"}
PATHS = {"arrow", "files", "lock", "mirror", "object_store", "path"}
"""The modules of core that ask where a path lies; they know no Ray."""
RULES = {"fields", "filtering", "measures", "partitions", "quality", "safety", "similarity", "words"}
"""Rules over text: they import each other, the config and core, and nothing else of the pipeline."""
RAYLESS_MODULES = {
    f"{folder}/{name}.py"
    for folder, names in {
        "data": "drift fields filtering hub input_files manifest measures near_duplicates partitions plan prepare "
        "quality read_json read_tables read_text records safety shards similarity sources tokenizer tokenizing unused",
        "core": " ".join(PATHS),
        "training": "assembly checkpoints collectives fsdp loop saving space step strategy study sweep validation",
        "index": "chunks dead_letters documents encoder indexing search sync table vectors where words writer",
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
        return
    packages = {name.split(".")[0] for name in found}
    without_ray = own in WITHOUT_RAY or str(inside) in RAYLESS_MODULES
    yield from {name.split(".")[1] for name in found if name.startswith("pipeline.")} - MAY_IMPORT[own] - {own}
    yield from packages & {"jobs", "tests", "benchmarks", *(["ray"] if without_ray else [])}
    yield from packages & {"torch"} if own in WITHOUT_TORCH else ()
    yield from found & {"pipeline"}  # `from pipeline import x` would hide the folder that x is in


def test_imports() -> None:
    found = {str(path.relative_to(ROOT)): sorted(faults(path)) for path in modules()}
    assert not {path: names for path, names in found.items() if names}
    assert {str(path.relative_to(ROOT / "pipeline")) for path in modules()} >= RAYLESS_MODULES


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, pipeline; print(sorted(name for name in sys.modules if name.startswith('pipeline.')))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    assert set(pipeline._HOMES) == set(pipeline.__all__)
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name


def test_rules_over_text_need_neither_ray_nor_torch() -> None:
    allowed = ("pipeline.config", "pipeline.core", *(f"pipeline.data.{name}" for name in RULES))
    for name in RULES:
        path = ROOT / f"pipeline/data/{name}.py"
        assert not {each for each in imports(path) if each.startswith("pipeline") and not each.startswith(allowed)}, (
            name
        )
        assert not list(faults(path)), name


def test_only_the_path_modules_ask_where_a_path_lies() -> None:
    asking = re.compile(
        r"isinstance\([^)]*\b(Path|BucketPath)\b|pyarrow\.fs|import obstore|urlparse|\.startswith\(.(s3|gs|az):"
    )
    found = [
        path
        for path in modules()
        if not (path.parent.name == "core" and path.stem in PATHS) and asking.search(path.read_text("utf-8"))
    ]
    assert not found


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, needs in MAY_IMPORT.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_files_are_of_a_size_to_read() -> None:
    for path in [*modules(), *(ROOT / "jobs").glob("*.py")]:
        assert len(path.read_text("utf-8").splitlines()) <= (130 if path.parent.name == "jobs" else 400), path
