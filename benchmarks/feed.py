"""The training feed: how soon its first batch is there, how well it shuffles, and what it costs the loop.

  python benchmarks/feed.py --data data              # debian/train.jsonl and wordnet/pairs.jsonl
  python benchmarks/feed.py --data data --storage kept --steps 100 --repeats 1

First batch: seconds from asking to having it, Ray warm, at the first step and at step 10,000 in turns, each feed by
itself; medians. Shuffle: an epoch's order beside a permutation of the same rows, and what one is expected to give.
Loop: pairs per second of a training loop on two workers, fed through Ray Data, against the same loop over the same
batches that lie in memory as tensors, in turns within one run; the rate is counted once the feed runs.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import Progress, ray_session, set_environment

set_environment()

from benchmarks.corpora import machine
from pipeline.config import Config, Data, Source, load
from pipeline.config.tree import Storage
from pipeline.core.console import table
from pipeline.data.feed import LocalFeed, RayFeed, training_plan
from pipeline.data.manifest import Manifest
from pipeline.data.plan import BatchPlan
from pipeline.data.prepare import prepare

FAR = 10_000  # steps
BATCH = 512  # the quickstart's
WARM_STEPS = 8  # of a segment that are not counted
BEYOND = 1024  # steps that the feed could read on after a segment, so that reading does not end before it
WORKERS = 2
MODELS = {"token table": ["model.num_layers=0"], "one layer": ["model.num_layers=1", "model.d_ff=256"]}


def prepared(data: Path, root: Path, progress: Progress) -> tuple[Path, Manifest]:
    files = {"debian": "train.jsonl", "wordnet": "pairs.jsonl"}
    sources = [Source(name=name, type="json", path=str(data / name / file)) for name, file in files.items()]
    config = Config(storage=Storage(root=str(root)), data=Data(sources=sources, min_chars=1))
    folder, manifest = prepare(config, lambda: progress)
    assert isinstance(folder, Path)
    return folder, manifest


# How soon the first batch is there.


def first_batches(plan: BatchPlan, repeats: int) -> list[list[str]]:
    """A line a feed: median seconds at both steps, and their ratio."""
    lines = []
    for name, feed in (("LocalFeed", LocalFeed(plan)), ("RayFeed", RayFeed(plan, 0, 1))):
        seconds: dict[int, list[float]] = {0: [], FAR: []}
        _first(feed, 1)
        for repeat in range(repeats):
            for step in (0, FAR) if repeat % 2 else (FAR, 0):
                seconds[step].append(_first(feed, step))
        near, far = median(seconds[0]), median(seconds[FAR])
        spread = f"{min(seconds[FAR]):.3f} to {max(seconds[FAR]):.3f}"
        lines.append([name, f"{near:.3f}", f"{far:.3f}", f"{far / near:.2f}", spread])
    return lines


def _first(feed: LocalFeed | RayFeed, step: int) -> float:
    began = time.perf_counter()
    batches = feed.batches(step, step + BEYOND)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


# How well it shuffles.


def shuffling(plan: BatchPlan) -> list[list[str]]:
    """A line a measure: of the plan's second epoch, of a permutation of its rows, and what is expected of one."""
    n, size = plan.batches_per_epoch, plan.global_batch_size
    canonical = {one: place for place, one in enumerate(_ids_in_storage(plan))}
    before, ours = (
        np.array([canonical[one] for batch in LocalFeed(plan).batches(*ends) for one in batch["id"].to_pylist()])
        for ends in ((0, n), (n, 2 * n))
    )
    chance = np.random.default_rng(0)
    permuted = chance.permutation(plan.rows)[: n * size], chance.permutation(plan.rows)[: n * size]
    found = [
        list(_measures(plan, *(order.reshape(n, size) for order in orders)).values())
        for orders in ((before, ours), permuted)
    ]
    groups = np.array([group.rows for group in plan.row_groups])
    of = plan.rows
    share = max(plan.shares.values())
    expected = [
        (groups * (groups - 1)).sum() / (of * (of - 1)),
        (of + 1) / 3 / of,
        0.0,
        size / of,
        float(share * (1 - share) / size * (of - size) / (of - 1)) ** 0.5,
    ]
    names = list(_measures(plan, *(order.reshape(n, size) for order in permuted)))
    return [[name, *(f"{value:.4f}" for value in row)] for name, *row in zip(names, *found, expected, strict=True)]


def _ids_in_storage(plan: BatchPlan) -> Iterator[str]:
    import pyarrow.parquet as pq

    for group in plan.row_groups:
        rows = pq.ParquetFile(Path(plan.folder) / group.path).read_row_group(group.index, columns=["id"])
        yield from rows["id"].to_pylist()


def _measures(plan: BatchPlan, before: np.ndarray, order: np.ndarray) -> dict[str, float]:
    """Of (K, B) places in storage, batch by batch, and those of the epoch before."""
    ends = np.cumsum([group.rows for group in plan.row_groups])
    group = np.searchsorted(ends, order, side="right")
    sources = np.array([str(each.source) for each in plan.row_groups])
    largest = max(plan.shares, key=lambda name: plan.shares[name])
    met = np.full(plan.rows, -1)
    met[before] = np.arange(len(before))[:, None]
    place = order.ravel()
    ranks = np.argsort(np.argsort(place))
    return {
        "pairs in a batch from one row group": _alike(group),
        "mean distance in storage of two rows of a batch": _distance(order) / plan.rows,
        "rank correlation of order and storage": float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1]),
        "pairs in a batch that met in the epoch before": _alike(met[order]),
        "deviation of the larger source's share in a batch": float((sources[group] == largest).mean(axis=1).std()),
    }


def _distance(order: np.ndarray) -> float:
    """Mean difference of two values in a row of a (K, B) matrix."""
    size = order.shape[1]
    return float((np.sort(order, axis=1) * (2 * np.arange(size) - size + 1)).sum(axis=1).mean() * 2 / size / (size - 1))


def _alike(values: np.ndarray) -> float:
    """Share of pairs within rows of a (K, B) matrix that have the same value; -1 is like no other."""
    alike = 0
    for row in values:
        _, counts = np.unique(row[row >= 0], return_counts=True)
        alike += int((counts * (counts - 1)).sum())
    return alike / (values.shape[0] * values.shape[1] * (values.shape[1] - 1))


# What it costs the loop.


def loop(sent: dict[str, Any]) -> None:
    """A training worker: segments over tensors in memory and through the feed, in turns."""
    import ray.train
    import torch
    from tokenizers import Tokenizer

    from pipeline.model.batch import MicroBatch
    from pipeline.training.assembly import build_learner
    from pipeline.training.optimizer import build_optimizer
    from pipeline.training.prefetch import Prefetch, to_batch
    from pipeline.training.step import backward
    from pipeline.training.strategy import build_strategy

    config, plan, steps = sent["config"], sent["plan"], sent["steps"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learner = build_learner(config, Tokenizer.from_file(str(Path(plan.folder) / "tokenizer.json")), negatives=False)
    strategy, optimizer = (
        build_strategy(config, learner, torch.device("cpu")),
        build_optimizer(learner, config.training),
    )
    strategy.attach(learner.train())

    def prepare(rows: Any) -> list[MicroBatch]:
        return [learner.prepare(to_batch(rows), seed=0)]

    def rate(batches: Iterable[list[MicroBatch]]) -> float:
        began = 0.0
        for step, parts in enumerate(itertools.islice(batches, WARM_STEPS + steps)):
            if step == WARM_STEPS:
                began = time.monotonic()
            backward(learner, strategy, parts)
            strategy.clip(1.0)
            optimizer.step()
        return steps * plan.global_batch_size / (time.monotonic() - began)

    def in_memory(start: int) -> float:
        rows = LocalFeed(plan, rank, WORKERS).batches(start, start + WARM_STEPS + steps)
        return rate([prepare(each) for each in rows])

    waited: list[float] = []

    def fed(start: int) -> float:
        rows = RayFeed(plan, rank, WORKERS).batches(start, start + steps + BEYOND)
        with closing(Prefetch(rows, prepare)) as batches:
            found = rate(batches)
            waited.append(batches.waited_s)
        return found

    rate(map(prepare, LocalFeed(plan, rank, WORKERS).batches(0, WARM_STEPS + steps)))  # warms up
    sides: dict[str, Callable[[int], float]] = {"memory": in_memory, "feed": fed}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(sent["repeats"]):
        for name in sides if repeat % 2 else reversed(sides):
            rates[name].append(sides[name](repeat * steps))
    if rank == 0:
        sent["results"].write_text(json.dumps({**rates, "waited_s": waited}))


def loops(plan: BatchPlan, steps: int, repeats: int, root: Path) -> Iterator[list[str]]:
    """A line a model: medians of both sides, and of their ratio repeat by repeat."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    results = root / "rates.json"
    for name, overrides in MODELS.items():
        config = load(ROOT / "configs" / "quickstart.yaml", overrides, environ={})
        trainer = TorchTrainer(
            loop,
            train_loop_config={"config": config, "plan": plan, "steps": steps, "repeats": repeats, "results": results},
            scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name=f"feed-{name.replace(' ', '-')}-{time.time_ns()}", storage_path=str(root)),
        )
        trainer.fit()
        found = json.loads(results.read_text())
        ratios = sorted(fed / memory for fed, memory in zip(found["feed"], found["memory"], strict=True))
        rates = [f"{median(found[side]):,.0f}" for side in ("memory", "feed")]
        yield [name, *rates, f"{median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"]
        print(name, found, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/train.jsonl, wordnet/pairs.jsonl")
    parser.add_argument("--storage", type=Path, help="keeps what is prepared; by default nothing is kept")
    parser.add_argument("--steps", type=int, default=300, help="counted steps of a segment")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ray_session() as progress:
        root = (args.storage or Path(scratch)).resolve()
        folder, manifest = prepared(args.data.resolve(), root, progress)
        plan = training_plan(folder, manifest, BATCH, 0)
        first = first_batches(plan, 2 * args.repeats + 1)
        shuffle = shuffling(plan)
        trained = list(loops(plan, args.steps, args.repeats, root))
    print(f"\n{machine()}\n{plan.rows:,} pairs in {len(plan.row_groups)} row groups, batches of {BATCH}\n")
    print(table(first, ["first batch", "s at step 0", f"s at step {FAR:,}", "ratio", "least to most"]), end="\n\n")
    print(table(shuffle, ["shuffle", "ours", "a permutation", "expected of one"]), end="\n\n")
    print(table(trained, ["loop", "pairs/s in memory", "pairs/s fed", "ratio", "least to most"]))


if __name__ == "__main__":
    main()
