"""What `ray job submit --working-dir .` sends, by Ray's own packing, and the runtime_env that goes with it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.validation import parse_and_validate_pip, parse_and_validate_uv

ROOT = Path(__file__).parents[1]
MOST_BYTES = 2_000_000  # Ray compresses nothing, and refuses more than 512 MiB
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    target = tmp_path_factory.mktemp("packed") / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert target.stat().st_size < MOST_BYTES
    with ZipFile(target) as archive:
        yield archive


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_jobs_need_is_packed_and_nothing_else_but_the_pages_beside(packed: ZipFile) -> None:
    names = {name for name in packed.namelist() if not name.endswith("/")}
    there = {name for name in tracked() if (ROOT / name).is_file()}
    needed = {name for name in there if name.startswith(("pipeline/", "jobs/", "configs/"))}
    assert needed
    assert needed <= names  # not lost to .gitignore
    assert {"pyproject.toml", "constraints.txt", "README.md"} <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", ".git/", ".venv/", "data/"))}


def test_no_secret_and_no_byproduct_is_packed(tmp_path: Path) -> None:
    """Where .gitignore is told to be ignored too."""
    for name in (".gitignore", ".rayignore"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    left = ["api.env", "configs/api.env", "data/pairs.jsonl", "exported/model.safetensors", ".venv/x", ".git/config"]
    kept = ["configs/mine.yaml", "pipeline/data/plan.py", "jobs/train.py"]
    for name in [*left, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for include_gitignore in (True, False):
        target = tmp_path.parent / f"{tmp_path.name}-{include_gitignore}.zip"
        create_package(
            str(tmp_path), target, include_gitignore=include_gitignore, excludes=get_runtime_env_default_excludes()
        )
        with ZipFile(target) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {*kept, ".gitignore", ".rayignore"}


def test_the_runtime_env_is_one_that_ray_takes() -> None:
    described = yaml.safe_load(RUNTIME_ENV.read_text())
    assert described.keys() == {"env_vars", "pip"}
    packages = parse_and_validate_pip(described["pip"])["packages"]
    assert packages == parse_and_validate_uv(described["pip"])["packages"]
    assert len(packages) == 2
    for line in packages:  # both are in what is packed
        path = line.removeprefix("-c ").replace("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}", str(ROOT))
        assert Path(path).exists()
    assert float(described["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 60  # checkpointing.grace_s
