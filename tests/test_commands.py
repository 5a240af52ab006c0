"""Commands from outside: help, exit codes, and the files people start from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedding_world import save_random_model

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("job", JOBS)
def test_help_has_examples_and_imports_neither_ray_nor_torch(job: str) -> None:
    done = python("-X", "importtime", f"jobs/{job}.py", "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout
    assert f"python jobs/{job}.py" in done.stdout.split("examples:")[1]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "pydantic" in imported
    assert imported.isdisjoint({"ray", "torch", "pyarrow", "lancedb"})


def test_what_reads_and_ranks_does_without_torch() -> None:
    """Each process of Ray's that imports it takes seconds and 200 MB for it."""
    tasks = ("data.prepare", "data.feed", "embedding.embed", "evaluation.retrieval", "mining.mine")
    imports = ", ".join(f"pipeline.{name}" for name in tasks)
    assert python("-c", f"import sys, {imports}; sys.exit('torch' in sys.modules)").returncode == 0


def test_an_encoder_loads_neither_a_compiler_nor_a_store(tmp_path: Path) -> None:
    """Two seconds each, of torch's compiler and of LanceDB, that every query and every encoding actor would wait."""
    folder = save_random_model(tmp_path / "model")
    code = f"""
import sys
from pathlib import Path
from pipeline.config.embedding import Embedding
from pipeline.embedding import embed, sync
from pipeline.embedding.encode import open_encoder
from pipeline.embedding.recipe import EncoderRecipe
vectors = open_encoder(EncoderRecipe(Path({str(folder)!r}), Embedding(), Path())).encode(["a text"])
sys.exit(vectors.shape != (1, 32) or bool({{"torch._dynamo", "lancedb"}} & sys.modules.keys()))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_training_loads_no_sharded_checkpoints_and_no_compiler() -> None:
    """A second and more, in each worker and in Ray's controller of a run."""
    code = """
import sys, pipeline.training.worker, pipeline.training.assembly
sys.exit(bool({"torch.distributed.checkpoint", "torch._dynamo"} & sys.modules.keys()))
"""
    assert python("-c", code).returncode == 0


def test_a_wrong_key_exits_2_from_a_shell(tmp_path: Path) -> None:
    done = python("jobs/train.py", "training.learning_rat=1")
    assert done.returncode == 2
    assert "did you mean learning_rate?" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"


def test_make_installs_from_the_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt" in makefile
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    cuda = [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))]
    assert cuda == ["nvidia-ml-py"]  # which reads a GPU's use, and is no part of torch


def test_commands_in_the_readme_name_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"(?:jobs|configs|benchmarks|tests)/\w+\.(?:py|yaml|md)", readme))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", readme)) <= targets
