"""Training on Ray: the driver's side, which checks, starts and follows, and the worker round the loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError
from pipeline.data.feed import RayFeed, training_plan, validation_rows
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.runtime.console import log
from pipeline.runtime.job import JobError
from pipeline.runtime.session import Board, cluster_capacity
from pipeline.training.checkpoints import TrainState, newest_valid, next_attempt, prune, read_state
from pipeline.training.history import History
from pipeline.training.run_folder import claim_run_folder, refuse_other_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pipeline.training.loop import Run
    from pipeline.training.validation import Validation

DEFAULT_EPOCHS = 3
DEFAULT_CPU_WORKERS = 2
MAX_FAILURES = 3  # restarts of the worker group before the run gives up


@dataclass(frozen=True)
class Workers:
    """How many training workers there are, and what each reserves."""

    number: int
    cpus: float
    gpus: float


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


def steps_of(config: Config, plan: Plan) -> int:
    """Optimizer steps of the whole run: whichever limit comes first."""
    steps, epochs = config.training.max_steps, config.training.max_epochs
    if epochs is None:
        if steps is not None:
            return steps
        epochs = DEFAULT_EPOCHS
    by_epochs = max(1, math.ceil(epochs * plan.batches_per_epoch))
    return min(by_epochs, steps or by_epochs)


def is_finished(config: Config, plan: Plan, state: TrainState) -> bool:
    limit = config.training.max_time_s
    return state.step >= steps_of(config, plan) or (limit is not None and state.train_seconds >= limit)


def resume_point(config: Config) -> tuple[Path | None, TrainState]:
    """The newest whole checkpoint and its state; says which ones were passed over."""
    checkpoint, passed_over = newest_valid(config.run_dir)
    for sentence in passed_over:
        log.warning("train: %s", sentence)
    return checkpoint, read_state(checkpoint) if checkpoint else TrainState()


def finished_state(config: Config, folder: Path, manifest: Manifest) -> TrainState | None:
    """The state of a run that has nothing left to do. Refuses a run folder of another config or data set."""
    refuse_other_run(config, manifest.fingerprint)
    _, state = resume_point(config)
    plan = training_plan(folder, manifest, config.training.global_batch_size, config.training.seed)
    return state if state.step and is_finished(config, plan, state) else None


def fit(config: Config, folder: Path, manifest: Manifest, board: Board) -> TrainState:
    """Train, or go on training, to the end. Returns the final state."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from tokenizers import Tokenizer

    from pipeline.training.build import check_model

    plan = training_plan(folder, manifest, config.training.global_batch_size, config.training.seed)
    check_model(config, Tokenizer.from_file(str(folder / "tokenizer.json")))
    workers, threads = _workers(config, plan)
    claim_run_folder(config, manifest.fingerprint)
    total_steps = steps_of(config, plan)
    _, state = resume_point(config)
    log.info(
        "train: %s steps of %s pairs on %d workers of %g CPUs and %g GPUs%s",
        f"{total_steps:,}",
        config.training.global_batch_size,
        workers.number,
        workers.cpus,
        workers.gpus,
        f", on from step {state.step:,}" if state.step else "",
    )

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: object) -> None:
            """Leave signals to the job, which turns them into an orderly end."""

    trainer = Trainer(
        train_worker,
        train_loop_config={"task": Task(config, folder, manifest, plan, total_steps, threads, board.handle)},
        scaling_config=ScalingConfig(
            num_workers=workers.number,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
        ),
        run_config=RunConfig(
            name=next_attempt(config.run_dir),
            storage_path=str(config.run_dir),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpointing.max_checkpoints),
        ),
    )
    prune(config.run_dir, config.checkpointing.max_checkpoints)
    history = History(config.run_dir / "metrics.jsonl", state.step)
    with board.stage("train", total_steps, "steps", counter="steps", start=state.step, receive=history.write):
        _fit(trainer)
    prune(config.run_dir, config.checkpointing.max_checkpoints)
    return resume_point(config)[1]


def _fit(trainer: Any) -> None:
    from ray.train.v2.api.exceptions import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        log.debug("training failed", exc_info=True)
        reasons = getattr(error, "worker_failures", None) or {0: error}
        lines = str(next(iter(reasons.values()))).strip().splitlines()
        raise JobError(
            f"training failed: {lines[-1] if lines else type(error).__name__}; training.log has the workers' own words"
        ) from error


def _workers(config: Config, plan: Plan) -> tuple[Workers, int]:
    """Workers that fit the cluster, and torch threads for each. Raises ConfigError saying what would fit."""
    capacity, wanted = cluster_capacity(), config.scaling
    cpus, gpus = capacity.cpus, capacity.gpus
    gpu_share = (1.0 if gpus else 0.0) if wanted.gpus_per_worker == "auto" else wanted.gpus_per_worker
    if wanted.num_workers == "auto":
        most = max(1, int(gpus / gpu_share)) if gpu_share else DEFAULT_CPU_WORKERS
        number = max(n for n in range(1, most + 1) if plan.lanes % n == 0)
    else:
        number = wanted.num_workers
    workers = Workers(number, wanted.cpus_per_worker, gpu_share)
    fitting = int((cpus - 1) / workers.cpus)
    if workers.number * workers.cpus > cpus - 1:
        raise ConfigError(
            f"scaling: found {workers.number} workers of {workers.cpus:g} CPUs and {cpus:g} CPUs in all, of which "
            f"reading data takes 1; allowed "
            + (f"are {fitting} workers of {workers.cpus:g}, or " if fitting else "is ")
            + f"scaling.cpus_per_worker={(cpus - 1) / workers.number:g}"
        )
    if workers.number * workers.gpus > gpus:
        raise ConfigError(
            f"scaling: found {workers.number} workers of {workers.gpus:g} GPUs; allowed are the {gpus:g} there are"
        )
    if plan.lanes % workers.number:
        allowed = ", ".join(str(n) for n in range(1, plan.lanes + 1) if plan.lanes % n == 0)
        raise ConfigError(
            f"scaling.num_workers: found {workers.number}; allowed with training.global_batch_size="
            f"{plan.global_batch_size} are {allowed}"
        )
    if (plan.global_batch_size // workers.number) < config.training.gradient_accumulation_steps:
        raise ConfigError(
            f"training.gradient_accumulation_steps: found {config.training.gradient_accumulation_steps}; "
            f"allowed are at most the {plan.global_batch_size // workers.number} pairs of a worker's share"
        )
    return workers, max(1, int(max(capacity.cpus_there // workers.number, workers.cpus)))


def train_worker(sent: dict[str, Any]) -> None:
    """One training worker: set up torch, build the run, take up the newest checkpoint, loop."""
    import ray.train
    import torch
    from tokenizers import Tokenizer

    from pipeline.training.build import build_learner, describe
    from pipeline.training.checkpoints import load_optimizer, load_weights
    from pipeline.training.loop import Run, train

    task: Task = sent["task"]
    config = task.config
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(task.threads)
    torch.manual_seed(config.training.seed)
    tokenizer_json = (task.folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    learner = build_learner(config, tokenizer, negatives="negatives" in task.manifest.text_fields)
    if rank == 0:
        task.board.post.remote({"log": f"train: {describe(learner)}"})
    run = Run(
        learner=learner,
        config=config,
        batches=RayFeed(task.plan, rank, world_size).batches,
        validation=_validation(task, tokenizer),
        total_steps=task.total_steps,
        save=_saver(task, rank, tokenizer_json),
        report=_reporter(task.board),
        device=ray.train.torch.get_device(),
    )
    state, checkpoint = TrainState(), newest_valid(config.run_dir)[0]
    if checkpoint:
        state = read_state(checkpoint)
        load_weights(checkpoint, learner)
        load_optimizer(checkpoint, run.optimizer, run.device)
    if not is_finished(config, task.plan, state):
        train(run, state)


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


def _saver(task: Task, rank: int, tokenizer_json: str) -> Callable[[Run, TrainState, bool], None]:
    """Rank 0 writes; Ray carries the checkpoint to storage; every rank reports, which is a barrier."""
    import ray.train

    from pipeline.training.checkpoints import incoming_folder, keep_best, save_checkpoint, step_folder

    def save(run: Run, state: TrainState, is_best: bool) -> None:
        name = step_folder(state.step)
        if rank:
            ray.train.report(state.metrics, checkpoint_dir_name=name)
            return
        folder = incoming_folder(task.config.run_dir) / name
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            save_checkpoint(
                folder,
                run.learner,
                run.optimizer,
                state,
                tokenizer_json=tokenizer_json,
                max_length=task.config.tokenizer.max_length,
            )
            if is_best:
                keep_best(folder, task.config.run_dir)
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
            ray.train.report(state.metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    return save


def _reporter(board: Any) -> Callable[[dict[str, float]], None]:
    """Rank 0's metrics, sent to the driver: it draws the bar and writes the history."""

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
