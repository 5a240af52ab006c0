"""Commands from outside: help, exit codes, and the files people start from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.embedding_world import save_random_model

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_has_examples_and_imports_neither_ray_nor_torch() -> None:
    """Each job runs in a fork of a process that has loaded what they all start with."""
    code = f"""
import os, runpy, sys
import pipeline.job
for job in {JOBS}:
    if os.fork() == 0:
        sys.argv = [f"jobs/{{job}}.py", "--help"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            loaded = {{"ray", "torch", "pyarrow", "lancedb"}} & sys.modules.keys()
            print(end.code, *loaded, end="\\f", flush=True)
            os._exit(0)
    os.wait()
"""
    outputs = python("-c", code).stdout.removesuffix("\f").split("\f")
    for job, output in zip(JOBS, outputs, strict=True):
        assert "--config" in output
        assert f"python jobs/{job}.py" in output.split("examples:")[1]
        assert output.splitlines()[-1] == "0"


def test_no_process_loads_more_than_its_work_needs(tmp_path: Path) -> None:
    """Each task, worker, encoder and query would wait seconds for it; torch also takes 200 MB.

    The steps share one process, which keeps what earlier steps loaded; tasks without torch get a fork.
    """
    code = f"""
import os, runpy, sys
from pathlib import Path

def check_absent(*names):
    found = set(names) & sys.modules.keys()
    assert not found, found

child = os.fork()
if child == 0:
    import pipeline.data.prepare, pipeline.data.feed, pipeline.index.embed
    import pipeline.evaluation.retrieval, pipeline.index.mine
    check_absent("torch")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0

sys.argv = ["benchmarks/gpu.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
check_absent("ray", "transformers")

import pipeline.training.worker, pipeline.training.assembly
check_absent("torch.distributed.checkpoint", "torch._dynamo")

from pipeline.config.embedding import Embedding
from pipeline.index import embed, sync
from pipeline.index.encoder import open_encoder
from pipeline.index.encoder import EncoderRecipe
model = Path({str(save_random_model(tmp_path / "model"))!r})
assert open_encoder(EncoderRecipe(model, Embedding(), Path())).encode(["a text"]).shape == (1, 32)
check_absent("torch._dynamo", "lancedb")
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "python benchmarks/gpu.py" in done.stdout.split("examples:")[1]


def test_a_wrong_key_exits_2_from_a_shell(tmp_path: Path) -> None:
    done = python("jobs/train.py", "training.learning_rat=1")
    assert done.returncode == 2
    assert "did you mean learning_rate?" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"


def test_make_installs_from_the_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt" in makefile
    done = subprocess.run(["make", "-nB", "install", "UV="], cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert all(line.startswith('echo "installing ') and "-c constraints.txt" in line for line in installs)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = (each.partition("~")[0] for each in needed if each.startswith("ray["))
    assert any(f"'{ray}'" in line for line in installs)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
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
