"""The training loop in forked workers, killed where it is told, and started again until it ends.

    starts = [Start(2, [Kill("writing", 3, [0])]), Start(3)]      # the last ones until the run is at its end
    finished = train_in(folder, settings, starts)                 # in a process of its own, which forks them
    finished.weights, finished.ids[step], finished.losses[step]

Without Ray, so a start costs a second. A worker kills itself with SIGKILL at the n-th pass of a place; those that are
left are then killed too, as Ray ends a group that has lost a worker.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from tokenizers import Tokenizer, models, processors

from pipeline.config import Config, load
from pipeline.core.artifact import write_parquet
from pipeline.core.files import local_copy
from pipeline.data.manifest import Manifest, Shard, TeacherVectors
from pipeline.index.vectors import as_column
from pipeline.training.checkpoints import newest_valid
from pipeline.training.saving import consolidate

VOCABULARY = 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PLACES = ("forward", "reduced", "updated", "writing", "written", "moved")
HANGS_S = 200
"""A start takes seconds. A worker that is still there after this says where it stands, and ends."""


@dataclass(frozen=True)
class Kill:
    """Before the forward pass, after the reduction, after the update; amid a file of a checkpoint, before and after it
    gets its place. With a bucket: amid an upload, before and after the state.json that ends it."""

    place: str
    count: int
    ranks: list[int]


@dataclass(frozen=True)
class Start:
    world_size: int
    kills: list[Kill] = field(default_factory=list)


@dataclass
class Finished:
    weights: bytes
    ids: dict[int, set[tuple[str, ...]]]
    """By step, the ids that it was trained on, sorted: one set of them, however often it was done."""
    losses: dict[int, float]
    starts: int


def prepared(folder: Path, rows: int = 200, *, pairs: bool = True) -> Manifest:
    """Token shards made here, without Ray: pairs that share a rare token, or longer texts alone."""
    chance = np.random.default_rng(0)
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shards = []
    for split, count in (("train", rows), ("validation", 16)):
        keys = chance.integers(5, VOCABULARY, count)
        texts = [[2, *chance.integers(5, VOCABULARY, chance.integers(2, 9)).tolist(), int(key), 3] for key in keys]
        columns = {
            "id": [f"{split}{i:04d}" for i in range(count)],
            "source": ["made"] * count,
            "anchor": pa.array([[2, int(key), 3] for key in keys], pa.list_(pa.int32())),
            "positive": pa.array(texts, pa.list_(pa.int32())),
        }
        if not pairs:
            bodies = [chance.integers(5, VOCABULARY, chance.integers(4, 40)).tolist() for _ in range(count)]
            texts = [[2, *body, 3] for body in bodies]
            columns = {"id": columns["id"], "source": columns["source"], "text": pa.array(texts, pa.list_(pa.int32()))}
        table = pa.table(columns)
        (folder / split).mkdir()
        for i, part in enumerate((table.slice(0, count // 2), table.slice(count // 2))):
            write_parquet(part, folder / split / f"{i:05d}.parquet")
            shards.append(Shard(f"{split}/{i:05d}.parquet", split, len(part), [len(part)], ["made"], ""))
    lengths: dict[str, dict[str, float]] = {"anchor": {}, "positive": {}} if pairs else {"text": {}}
    return Manifest("made", [], {"train": rows, "validation": 16}, shards, lengths, [], {})


def taught(folder: Path, manifest: Manifest, width: int = 12) -> Manifest:
    """With random vectors as a teacher's, beside the shards."""
    chance = np.random.default_rng(1)
    for shard in manifest.shards:
        (folder / "teacher" / shard.split).mkdir(parents=True, exist_ok=True)
        vectors = {
            f"teacher_{name}": as_column(chance.normal(size=(shard.rows, width))) for name in ("anchor", "positive")
        }
        write_parquet(pa.table(vectors), folder / "teacher" / shard.path)
    return replace(manifest, teacher=TeacherVectors(str(folder / "teacher"), width))


def train_in(
    folder: Path, settings: dict[str, Any], starts: list[Start], rows: int = 200, root: str | None = None
) -> Finished:
    """Run the starts one after the other, in a process that forks their workers. Raises where one fails by itself.

    `root` is storage.root, else the folder.
    """
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(settings | {"storage": {"root": root or str(folder), "run": "r"}}))
    manifest = prepared(folder / "data", rows)
    if "distillation" in settings["objective"]:
        manifest = taught(folder, manifest)
    (folder / "manifest.pickle").write_bytes(pickle.dumps(manifest))
    (folder / "starts.pickle").write_bytes(pickle.dumps(starts))
    log, command = folder / "log", [sys.executable, "-m", "tests.killed_loop", str(folder)]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=file).returncode
    assert code == 0, log.read_text()[-3000:]
    return _finished(folder, len(starts))


def _finished(folder: Path, starts: int) -> Finished:
    run_dir = load(folder / "c.yaml", environ={}).run_dir
    newest = newest_valid(run_dir).folder
    assert newest is not None
    checkpoint = local_copy(newest)
    consolidate(checkpoint)
    ids: dict[int, set[tuple[str, ...]]] = {}
    for start in range(starts):
        of_step: dict[int, list[list[str]]] = {}
        ranks = sorted(folder.glob(f"seen-{start}-*"))
        for path in ranks:
            for line in path.read_text().splitlines():
                step, found = json.loads(line)
                of_step.setdefault(step, []).append(found)
        for step, parts in of_step.items():
            if len(parts) == len(ranks):  # all of them took it up before one was killed
                ids.setdefault(step, set()).add(tuple(sorted(one for part in parts for one in part)))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return Finished((checkpoint / "model.safetensors").read_bytes(), ids, losses, starts)


def _main(folder: Path) -> None:
    """The process that forks: torch is imported once, and has started no thread yet."""
    import torch

    import pipeline.training.assembly  # noqa: F401

    torch.set_num_threads(1)
    config = load(folder / "c.yaml", environ={})
    manifest = pickle.loads((folder / "manifest.pickle").read_bytes())
    for number, start in enumerate(pickle.loads((folder / "starts.pickle").read_bytes())):
        children = []
        for rank in range(start.world_size):
            child = os.fork()
            if child == 0:
                _worker(folder, config, manifest, number, rank, start)
            children.append(child)
        killed = _wait(children)
        assert killed == bool(start.kills), f"start {number}: {start}"


def _wait(children: list[int]) -> bool:
    """Until all have ended; whether one was killed, upon which the others are."""
    left, killed = set(children), False
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.02)
            continue
        left.discard(child)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed = True
        if killed:
            for other in left:
                os.kill(other, signal.SIGKILL)
        elif status:
            time.sleep(1)  # its partners may be about to say why
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a worker ended with {status}")
    return killed


def _worker(folder: Path, config: Config, manifest: Manifest, number: int, rank: int, start: Start) -> None:
    import torch.distributed as dist

    from pipeline.training import assembly

    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        rendezvous = f"file://{folder}/rendezvous-{number}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=start.world_size)
        for kill in start.kills:
            if rank in kill.ranks:
                _plant(kill)
        _record(folder / f"seen-{number}-{rank}")
        assembly.train_locally(config, folder / "data", manifest)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _record(path: Path) -> None:
    """Note the ids of each step as it is taken up."""
    from pipeline.training import loop

    gradients = loop._gradients
    file = path.open("w")

    def noted(run: Any, ready: Any, state: Any) -> Any:
        file.write(json.dumps([state.step, ready.batch.ids]) + "\n")
        file.flush()
        return gradients(run, ready, state)

    loop._gradients = noted


def _plant(kill: Kill) -> None:
    """Let this process kill itself at the count-th pass of a place."""
    import obstore
    import torch

    from pipeline.core.path import BucketPath
    from pipeline.training import loop
    from pipeline.training.checkpoints import Committer
    from pipeline.training.optimizer import Precision
    from pipeline.training.strategy import DataParallel

    passed = 0

    def here() -> None:
        nonlocal passed
        passed += 1
        if passed == kill.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (here(), function(*args, **kwargs))[1]

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (function(*args, **kwargs), here())[0]

    def amid(save: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Any, path: Path) -> None:
            save(tensors, path)
            if passed + 1 == kill.count:
                os.truncate(path, path.stat().st_size // 2)
            here()

        return wrapped

    def half(upload: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: BucketPath, file: Path) -> None:
            if passed + 1 == kill.count:
                half_written = obstore.open_writer(path.store.connect(), path.key)
                half_written.write(file.read_bytes()[: file.stat().st_size // 2])
                half_written.flush()
            here()
            upload(path, file)

        return wrapped

    owner, name, planted = {
        "forward": (loop, "backward", before),
        "reduced": (DataParallel, "clip", before),
        "updated": (Precision, "step", after),
        "writing": (torch, "save", amid),
        "written": (Committer, "commit", before),
        "moved": (Committer, "commit", after),
        "uploading": (BucketPath, "upload", half),
        "sealing": (Committer, "_merged_state", after),
        "sealed": (Committer, "commit", after),
    }[kill.place]
    setattr(owner, name, planted(getattr(owner, name)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
