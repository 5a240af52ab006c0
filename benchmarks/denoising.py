"""Denoising on texts alone: what the loss, BLEU and retrieval do over the steps. Draws benchmarks/denoising.png.

examples:
  python benchmarks/denoising.py --data data           # the positives of data/debian/train.jsonl
  python benchmarks/denoising.py --data data --steps 1200 tokenizer.vocab_size=16000
  python benchmarks/denoising.py --data data objective.denoising.corruption=spans objective.denoising.ratio=0.15

The config is configs/denoise.yaml. NDCG@10 is that of each checkpoint's encoder on data/debian/beir. The vocabulary is
small and the texts are short, because the decoder and its output layer take nearly all of the time on a CPU.
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

from benchmarks.corpora import machine
from benchmarks.fine_tuning import score
from pipeline.core.console import table

PREFIX = "validation_denoising_"
POINTS = 6  # validations and checkpoints


def train(data: Path, storage: str, steps: int, overrides: list[str]) -> list[dict[str, float]]:
    """One run of jobs/train.py. Returns a row for each validation, with the NDCG@10 of its checkpoint."""
    source = {"name": "texts", "type": "json", "path": str(data / "debian" / "train.jsonl")}
    every = steps // POINTS
    settings = [
        f"storage.root={storage}",
        f"data.sources=[{json.dumps(source | {'fields': {'text': 'positive'}})}]",
        "tokenizer.vocab_size=4000",
        "tokenizer.max_length=32",
        f"training.max_steps={every * POINTS}",
        f"training.validate_every_steps={every}",
        f"checkpointing.every_steps={every}",
        f"checkpointing.max_checkpoints={POINTS + 1}",
        *overrides,
    ]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(ROOT / "configs" / "denoise.yaml")]
    done = subprocess.run([*command, *settings], stdout=subprocess.PIPE, text=True, check=True)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    history = Path(last["paths"]["history"]).read_text()
    rows = [row for row in map(json.loads, history.splitlines()) if PREFIX + "perplexity" in row]
    checkpoints = {
        int(path.name.removeprefix("step-")): path for path in Path(last["run_dir"]).glob("attempt-*/step-*")
    }
    return [row | {"ndcg@10": score(checkpoints[row["step"]], data, "fp32")} for row in rows]


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """The loss, BLEU and NDCG@10, each in a panel of its own."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    titles = {"validation_loss": "validation loss, nats a token", PREFIX + "bleu": "BLEU of restored texts"}
    titles["ndcg@10"] = "NDCG@10 on debian/beir"
    for (name, title), panel in zip(titles.items(), panels, strict=True):
        panel.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o")
        panel.set(title=title, xlabel="optimizer step")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl and debian/beir")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks" / "denoising.png")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        rows = train(args.data.resolve(), storage, args.steps, args.overrides)
    draw(rows, args.plot)
    names = ("validation_loss", PREFIX + "perplexity", PREFIX + "bleu", PREFIX + "rougeL", "ndcg@10")
    lines = [[f"{row['step']:,}", *(f"{row[name]:.3f}" for name in names)] for row in rows]
    print(f"\n{machine()}\n\n{table(lines, ['step', *(name.removeprefix(PREFIX) for name in names)])}")


if __name__ == "__main__":
    main()
