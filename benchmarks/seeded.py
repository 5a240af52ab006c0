"""Losses of seeded runs and hashes of prepared shards, for a refactor that must change neither.

    python benchmarks/seeded.py --data data > after.json
    python benchmarks/seeded.py --data data --project ../before > before.json   # another checkout
    diff before.json after.json

Each run is `python jobs/train.py` of the project for 50 steps: contrastive, contrastive with denoising, a pretrained
encoder (MiniLM), contrastive on two workers, and fsdp on two workers. The losses and gradient norms of all steps are
printed as they stand in metrics.jsonl. The shards are those of a corpus of JSON pairs and text files. Takes about six
minutes on two cores; numbers agree only between runs on the same kind of processor. Needs the `dev` packages.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fine_tuning import minilm

STEPS = 50
PAIRS, FILES = 8_000, 400
SMALL = {
    "training.global_batch_size": 64,
    "training.max_steps": STEPS,
    "training.log_every_steps": 1,
    "training.validate_every_steps": STEPS,
    "tokenizer.max_length": 64,
    "tokenizer.vocab_size": 4096,
    "scaling.num_workers": 1,
    "scaling.cpus_per_worker": 0.5,
}
LAYERS = {"model.num_layers": 2}


def runs() -> dict[str, dict[str, Any]]:
    """Settings of each run, beside SMALL."""
    two = {"scaling.num_workers": 2}
    return {
        "contrastive": LAYERS,
        "hybrid": {**LAYERS, "objective.contrastive": {}, "objective.denoising": {}, "model.decoder_layers": 1},
        "pretrained": {"model.pretrained": minilm(), "training.global_batch_size": 16, "training.learning_rate": 5e-5},
        "two workers": {**LAYERS, **two},
        "fsdp": {**LAYERS, **two, "training.strategy": "fsdp"},
    }


def corpus(data: Path, folder: Path) -> list[dict[str, Any]]:
    """The sources: pairs of debian's, and copies of some text files."""
    lines = (data / "debian" / "pairs.jsonl").read_text().splitlines(keepends=True)[:PAIRS]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "texts").mkdir()
    for path in sorted((data / "linux-doc").iterdir())[:FILES]:
        (folder / "texts" / path.name).write_bytes(path.read_bytes())
    return [{"name": "pairs", "type": "json", "path": str(folder / "pairs.jsonl")}]


def job(project: Path, name: str, settings: dict[str, Any]) -> Path:
    """Run a job; returns the folder that it names last."""
    arguments = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, str(project / "jobs" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    return Path(result["paths"]["prepared"] if name == "prepare" else result["run_dir"])


def losses(run_dir: Path) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/pairs.jsonl and linux-doc")
    parser.add_argument("--project", type=Path, default=ROOT, help="the checkout to run; by default this one")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = corpus(args.data, folder)
        texts = [{**pairs[0], "fields": {"text": "positive"}}]
        texts += [{"name": "texts", "type": "text", "path": str(folder / "texts"), "record": "paragraph"}]
        common = {**SMALL, "storage.root": str(folder / "root")}
        prepared = job(args.project, "prepare", {**common, "data.sources": texts, "objective.mlm": {}})
        shards = json.loads((prepared / "manifest.json").read_text())["shards"]
        found["shards"] = {shard["path"]: shard["sha256"] for shard in shards}
        for run, own in runs().items():
            settings = {**common, **own, "data.sources": pairs, "storage.run": run.replace(" ", "-")}
            found[run] = losses(job(args.project, "train", settings))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
