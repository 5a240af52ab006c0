"""A training worker of Ray Train: sets up torch, builds the run, takes up the newest checkpoint, and loops.

What it does for the loop that the loop cannot know of: batches through Ray Data, checkpoints through Ray's reporting,
metrics and alerts to the driver, and the wishes of the driver and of Ray, which tells of nodes about to be taken away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError
from pipeline.data.feed import RayFeed, validation_rows
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.training.checkpoints import TrainState, newest_valid, read_state
from pipeline.training.ending import is_finished

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pipeline.training.loop import Run, Wishes
    from pipeline.training.validation import Validation

POLL_S = 1.0


@dataclass(frozen=True)
class Task:
    """What a training worker is sent."""

    config: Config
    folder: Path
    manifest: Manifest
    plan: Plan
    total_steps: int
    threads: int
    board: Any


def train_worker(sent: dict[str, Any]) -> None:
    """Train to the end, or until asked to stop. What no restart would mend is told to the driver, and ends the run."""
    import ray.train
    import torch
    from tokenizers import Tokenizer

    from pipeline.training.build import build_learner, describe
    from pipeline.training.loop import Run, TrainingStopped, train
    from pipeline.training.saving import Saver, load

    task: Task = sent["task"]
    config = task.config
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    task.plan.check_workers(world_size)
    torch.set_num_threads(task.threads)
    torch.manual_seed(config.training.seed)
    tokenizer_json = (task.folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    learner = build_learner(config, tokenizer, negatives="negatives" in task.manifest.text_fields)
    tell = _teller(task.board, rank)
    tell({"log": f"train: {describe(learner)}"})
    try:
        run = Run(
            learner=learner,
            config=config,
            batches=RayFeed(task.plan, rank, world_size).batches,
            validation=_validation(task, tokenizer),
            total_steps=task.total_steps,
            save=Saver(config, tokenizer_json).save,
            report=_reporter(task.board),
            device=ray.train.torch.get_device(),
            wishes=_wishes(task, rank),
            alert=lambda title, text, step: tell({"alert": {"title": title, "text": text, "step": step}}),
        )
        state = _resume(run, load)
        if not is_finished(config, task.plan, state):
            train(run, state)
        ray.train.report({})  # waits until all checkpoints are where they belong
    except (TrainingStopped, ConfigError) as error:  # on all workers alike
        tell({"fatal": str(error), "config": isinstance(error, ConfigError)})


def _resume(run: Run, load: Callable[[Path, Run], None]) -> TrainState:
    """Rank 0 chooses the checkpoint, for all workers see the same disk, but not at the same time."""
    import torch.distributed as dist

    from pipeline.objectives.collectives import rank

    chosen = [newest_valid(run.config.run_dir)[0] if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, device=run.device)
    (checkpoint,) = chosen
    if checkpoint is None:
        return TrainState()
    load(checkpoint, run)
    return read_state(checkpoint)


def _teller(board: Any, rank: int) -> Callable[[dict[str, Any]], None]:
    """What posts rank 0's messages on the driver's board."""
    return lambda message: board.post.remote(message) if rank == 0 else None


def _reporter(board: Any) -> Callable[[dict[str, float]], None]:
    """Rank 0's metrics, sent to the driver: it draws the bar and keeps the trackers."""

    def report(metrics: dict[str, float]) -> None:
        message: dict[str, Any] = {"metrics": metrics}
        if "loss" in metrics:
            board.put.remote("steps", int(metrics["step"]))
            message["shown"] = f"loss {metrics['loss']:.3f}, {metrics['pairs_per_s']:,.0f} pairs/s"
        else:
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "step")
            message["log"] = f"train: step {metrics['step']:,.0f}: {values}"
        board.post.remote(message)

    return report


def _wishes(task: Task, rank: int) -> Callable[[int], Wishes]:
    """Rank 0 looks at the driver's board once a second; Ray is asked every few steps, of which all workers know."""
    import ray
    import ray.train

    from pipeline.training.loop import Wishes

    stop, saved_for = threading.Event(), set[str]()

    def follow() -> None:
        while not stop.wait(POLL_S):
            try:
                if ray.get(task.board.is_stop_wanted.remote()):
                    stop.set()
            except ray.exceptions.RayError:  # the session is going down
                return

    if rank == 0:
        threading.Thread(target=follow, name="wishes", daemon=True).start()

    def wishes(step: int) -> Wishes:
        leaving: set[str] = set()
        if step % task.config.training.log_every_steps == 0:
            notice = ray.train.get_preemption_info()
            leaving = set(notice.preempted_node_ids) - saved_for if notice else set()
            saved_for.update(leaving)
        return Wishes(stop.is_set(), bool(leaving))

    return wishes


def _validation(task: Task, tokenizer: Tokenizer) -> Validation:
    """Held-out rows, and an STS file where there is one."""
    from pipeline.data.judging import normaliser
    from pipeline.evaluation.sts import read_sts
    from pipeline.model.packing import pack
    from pipeline.training.batch import to_batch
    from pipeline.training.validation import StsPairs, Validation

    config, sts = task.config, None
    rows = validation_rows(task.folder, task.manifest, config.training.validation_pairs)
    if config.evaluation.sts_file:
        pairs, normalise = read_sts(Path(config.evaluation.sts_file)), normaliser(config.data)
        tokenizer.enable_truncation(config.tokenizer.max_length)
        first, second = (
            pack([encoding.ids for encoding in tokenizer.encode_batch_fast([normalise(text) for text in texts])])
            for texts in (pairs.first, pairs.second)
        )
        sts = StsPairs(first, second, pairs.scores)
    return Validation(to_batch(rows), tokenizer.decode_batch, config.training.generated_texts, sts)
