"""Denoising on texts alone: validation perplexity falls, BLEU and ROUGE rise. Draws benchmarks/denoising.png.

examples:
  python benchmarks/denoising.py --data data                    # paragraphs of data/linux-doc, configs/denoise.yaml
  python benchmarks/denoising.py --data data objective.denoising.corruption=spans objective.denoising.ratio=0.15
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.console import table

SCORES = ("perplexity", "bleu", "rouge1", "rouge2", "rougeL")
PREFIX = "validation_denoising_"


def train(data: Path, storage: str, overrides: list[str]) -> list[dict[str, Any]]:
    """One run of jobs/train.py. Returns the lines of metrics.jsonl that are of a validation."""
    source = {"name": "texts", "type": "text", "path": str(data / "linux-doc"), "record": "paragraph"}
    command = [
        sys.executable,
        str(ROOT / "jobs" / "train.py"),
        "--config",
        str(ROOT / "configs" / "denoise.yaml"),
        f"storage.root={storage}",
        f"data.sources=[{json.dumps(source)}]",
        *overrides,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    history = Path(json.loads(done.stdout.splitlines()[-1])["paths"]["history"])
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    return [row for row in rows if PREFIX + "perplexity" in row]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity on the left axis, BLEU and ROUGE, both 0 to 100, on the right."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, left = pyplot.subplots(figsize=(8, 4.5))
    left.plot(steps, [row[PREFIX + "perplexity"] for row in rows], color="black", marker="o", label="perplexity")
    left.set(xlabel="optimizer step", ylabel="validation perplexity", yscale="log")
    right = left.twinx()
    for name in SCORES[1:]:
        scale = 1 if name == "bleu" else 100
        right.plot(steps, [scale * row[PREFIX + name] for row in rows], marker=".", label=name)
    right.set(ylabel="BLEU, ROUGE F1 x 100", ylim=(0, None))
    figure.legend(loc="upper center", ncols=len(SCORES), frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with linux-doc")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks" / "denoising.png")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        rows = train(args.data.resolve(), storage, args.overrides)
    draw(rows, args.plot)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    print(table([[row["step"], *(f"{row[PREFIX + name]:.3f}" for name in SCORES)] for row in rows], ("step", *SCORES)))


if __name__ == "__main__":
    main()
