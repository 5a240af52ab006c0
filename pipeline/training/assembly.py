"""From a prepared data set to a run that is ready to loop, and back to where it stood: the same with Ray and without.

task = Task(config, folder, manifest, plan, total_steps)
state = run_task(task, feed.batches, Hooks(save=..., report=print))       # on every worker
state = train_here(config, folder, manifest)                              # one process, or torchrun's; no Ray
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from pipeline.config import Config
from pipeline.data.feed import LocalFeed, training_plan, validation_rows
from pipeline.data.judging import normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.model.packing import pack
from pipeline.model.scores import read_sts
from pipeline.objectives.collectives import rank, world_size
from pipeline.runtime.artifact import checked
from pipeline.runtime.console import log
from pipeline.storage.lock import holder_of
from pipeline.storage.path import StoragePath, as_path
from pipeline.training.batch import to_batch
from pipeline.training.build import build_learner, check_model, describe
from pipeline.training.checkpoints import (
    TrainState,
    newest_valid,
    next_attempt,
    noted_halvings,
    prune,
    read_state,
    step_folder,
)
from pipeline.training.ending import is_finished, steps_of
from pipeline.training.loop import Run, Wishes, train
from pipeline.training.run_folder import claim_run_folder
from pipeline.training.saving import Place, Saver, Take, load
from pipeline.training.tracking.tracker import Metrics
from pipeline.training.tracking.trackers import Trackers
from pipeline.training.validation import StsPairs, Validation


@dataclass(frozen=True)
class Task:
    """What every worker of a run is to know."""

    config: Config
    folder: StoragePath
    manifest: Manifest
    plan: Plan
    total_steps: int
    holder: str
    """Who holds the run's folder: see `Upload`."""

    @classmethod
    def of(cls, config: Config, folder: StoragePath, manifest: Manifest) -> Task:
        """Raises ConfigError where a split is too small for the batch."""
        settings = config.training
        plan = training_plan(folder, manifest, settings.global_batch_size, settings.seed, settings.batching)
        return cls(config, folder, manifest, plan, steps_of(config, plan), holder_of(config.run_dir))


@dataclass(frozen=True)
class Hooks:
    """What a run calls: see `Run`, and `Saver` for `place`, which takes a checkpoint to where a resume looks for it."""

    place: Place
    report: Callable[[dict[str, float]], None]
    alert: Callable[[str, str, int], None]
    wishes: Callable[[int], Wishes] = lambda step: Wishes()


def run_task(
    task: Task, batches: Callable[[int, int], Iterator[pa.Table]], hooks: Hooks, device: torch.device
) -> TrainState:
    """Train from the newest whole checkpoint, or from the start. Raises TrainingStopped, ConfigError on all workers."""
    config = task.config
    task.plan.check_workers(world_size())
    torch.manual_seed(config.training.seed)
    tokenizer_json = checked(task.folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    learner = build_learner(config, tokenizer, negatives="negatives" in task.manifest.text_fields)
    run = Run(
        learner=learner,
        config=config,
        batches=batches,
        validation=_validation(task, tokenizer),
        total_steps=task.total_steps,
        save=Saver(config, tokenizer_json, hooks.place, task.holder).save,
        report=hooks.report,
        device=device,
        wishes=hooks.wishes,
        alert=hooks.alert,
    )
    state = resume(run)
    if rank() == 0:
        log.info("train: %s", describe(run.learner))
        log.info("train: %d workers go on from step %d", world_size(), state.step)
    return state if is_finished(config, task.total_steps, state) else train(run, state)


def train_here(
    config: Config, folder: StoragePath, manifest: Manifest, told: Callable[[Metrics], None] = lambda metrics: None
) -> TrainState:
    """Train without Ray: in this process, or in those that torch.distributed has joined. Returns the final state.

    `told` gets, on rank 0, what the trackers get, after them.
    """
    task = Task.of(config, folder, manifest)
    check_model(config, Tokenizer.from_str(checked(folder / "tokenizer.json").read_text(encoding="utf-8")))
    if rank() == 0:
        claim_run_folder(config, folder, manifest, task.total_steps)
    attempt = next_attempt(config.run_dir)

    def place(state: TrainState, written: Path, take: Take | None) -> None:
        trackers.send()
        if take:
            take(written, config.run_dir / attempt / step_folder(state.step))
        if rank() == 0:
            prune(config.run_dir, config.checkpointing.max_checkpoints)

    def report(metrics: Metrics) -> None:
        trackers.log(metrics)
        told(metrics)

    checkpoint, passed_over = newest_valid(config.run_dir) if rank() == 0 else (None, [])
    for sentence in passed_over:
        log.warning("train: %s", sentence)
    with Trackers.open(config, read_state(checkpoint).step if checkpoint else 0, leader=rank() == 0) as trackers:
        feed = LocalFeed(task.plan, rank(), world_size())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return run_task(task, feed.batches, Hooks(place, report, trackers.alert), device)


def resume(run: Run) -> TrainState:
    """Take up the newest whole checkpoint, if there is one.

    Rank 0 chooses it: all workers see the same disk or bucket, but not at the same moment.
    """
    folder = run.config.run_dir
    chosen: list[tuple[StoragePath | None, int]] = [(None, 0)]
    if rank() == 0:
        chosen = [(newest_valid(folder)[0], noted_halvings(folder))]
    if world_size() > 1:
        dist.broadcast_object_list(chosen, device=run.device)
    ((checkpoint, halvings),) = chosen
    if checkpoint is not None:
        load(checkpoint, run)
    state = read_state(checkpoint) if checkpoint else TrainState()
    state.halvings = max(state.halvings, halvings)
    return state


def _validation(task: Task, tokenizer: Tokenizer) -> Validation:
    """Held-out rows, and an STS file where there is one."""
    config, sts = task.config, None
    rows = validation_rows(task.folder, task.manifest, config.training.validation_pairs)
    if config.evaluation.sts_file:
        pairs, normalise = read_sts(as_path(config.evaluation.sts_file)), normaliser(config.data)
        tokenizer.enable_truncation(config.tokenizer.max_length)
        first, second = (
            pack([encoding.ids for encoding in tokenizer.encode_batch_fast([normalise(text) for text in texts])])
            for texts in (pairs.first, pairs.second)
        )
        sts = StsPairs(first, second, pairs.scores)
    return Validation(to_batch(rows), tokenizer.decode_batch, config.training.generated_texts, sts)
