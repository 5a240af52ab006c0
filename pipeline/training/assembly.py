"""From a prepared data set to a run that is ready to loop, or to resume: the same with Ray and without.

task = Task.of(config, folder, manifest)
state = run_task(task, feed.batches, Hooks(save=..., report=print), device)     # on every worker
state = train_here(config, folder, manifest)                                    # one process, or torchrun's; no Ray
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from pipeline.config import Config
from pipeline.data.feed import LocalFeed, training_plan, validation_rows
from pipeline.data.judging import normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.evaluation.sts import read_sts
from pipeline.model.packing import pack
from pipeline.runtime.artifact import checked
from pipeline.runtime.console import log
from pipeline.storage.lock import holder_of
from pipeline.storage.path import StoragePath, as_path
from pipeline.training.build import build_learner, check_model, describe
from pipeline.training.checkpoints import ResumePoint, TrainState, noted_oom_splits, prune, resume_point
from pipeline.training.collectives import broadcast, rank, world_size
from pipeline.training.loop import Batches, Hooks, Run, build_run, train
from pipeline.training.prefetch import to_batch
from pipeline.training.run_folder import claim_run_folder
from pipeline.training.saving import LocalSaver, load_checkpoint
from pipeline.training.stopping import is_finished, steps_of
from pipeline.training.tracking.tracker import Metrics
from pipeline.training.tracking.trackers import Trackers
from pipeline.training.validation import StsPairs, Validation


@dataclass(frozen=True)
class Task:
    """What every worker of a run needs to know."""

    config: Config
    folder: StoragePath
    manifest: Manifest
    plan: Plan
    total_steps: int
    holder: str
    """Who holds the lock on the run's folder: see `Placer`."""

    @classmethod
    def of(cls, config: Config, folder: StoragePath, manifest: Manifest) -> Task:
        """Raises ConfigError where a split is too small for the batch."""
        settings = config.training
        plan = training_plan(folder, manifest, settings.global_batch_size, settings.seed, settings.batching)
        return cls(config, folder, manifest, plan, steps_of(config, plan), holder_of(config.run_dir))

    @property
    def tokenizer_json(self) -> str:
        return checked(self.folder / "tokenizer.json").read_text(encoding="utf-8")


def run_task(
    task: Task, batches: Batches, hooks: Hooks, device: torch.device, known: ResumePoint | None = None
) -> TrainState:
    """Train from the newest whole checkpoint, or from the start. Raises TrainingStopped, ConfigError on all workers.

    A `known` checkpoint was read already.
    """
    config = task.config
    task.plan.check_workers(world_size())
    torch.manual_seed(config.training.seed)
    tokenizer = Tokenizer.from_str(task.tokenizer_json)
    learner = build_learner(config, tokenizer, negatives="negatives" in task.manifest.text_fields)
    run = build_run(config, learner, batches, _validation(task, tokenizer), task.total_steps, hooks, device)
    state = resume(run, known)
    if rank() == 0:
        log.info("train: %s", describe(run.learner))
        log.info("train: training on %d workers from step %d", world_size(), state.step)
    return state if is_finished(config, task.total_steps, state) else train(run, state)


def resume(run: Run, known: ResumePoint | None = None) -> TrainState:
    """Load the newest whole checkpoint, if there is one.

    Rank 0 finds it for all workers: they see the same disk or bucket, but not at the same moment.
    """
    run_dir = run.config.run_dir
    found = (resume_point(run_dir, known), noted_oom_splits(run_dir)) if rank() == 0 else None
    point, oom_splits = broadcast(found) or (ResumePoint(), 0)
    if point.folder:
        load_checkpoint(point.folder, run)
    point.state.oom_splits = max(point.state.oom_splits, oom_splits)
    return point.state


def train_here(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
) -> TrainState:
    """Train without Ray: in this process, or in those that torch.distributed has joined. Returns the final state.

    `on_metrics` is called on rank 0 with what the trackers get, after them.
    """
    task, point = Task.of(config, folder, manifest), ResumePoint()
    check_model(config, Tokenizer.from_str(task.tokenizer_json))
    if rank() == 0:
        claim_run_folder(config, folder, manifest, task.total_steps)
        point = resume_point(config.run_dir)
        prune(config.run_dir, config.checkpointing.max_checkpoints, point.folder)

    def report(metrics: Metrics) -> None:
        trackers.log(metrics)
        on_metrics(metrics)

    with Trackers.open(config, point.state.step, leader=rank() == 0) as trackers:
        saver = LocalSaver(config, task.tokenizer_json, task.holder, trackers)
        feed = LocalFeed(task.plan, rank(), world_size())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return run_task(task, feed.batches, Hooks(saver.save, report, trackers.alert), device, point)


def _validation(task: Task, tokenizer: Tokenizer) -> Validation:
    """Held-out rows, and the pairs of an STS file if the config names one."""
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
