"""From a prepared data set to a run that is ready to loop, or to resume: the same with Ray and without.

task = Task.of(config, folder, manifest)
state = run_task(task, feed.batches, Hooks(save=..., report=print), device)     # on every worker
state = train_here(config, folder, manifest)                                    # one process, or torchrun's; no Ray
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import checked
from pipeline.core.console import log
from pipeline.core.files import fetched
from pipeline.core.lock import holder_of
from pipeline.core.path import StoragePath, as_path
from pipeline.data.feed import LocalFeed, training_plan, validation_rows
from pipeline.data.filtering import normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.plan import BatchPlan
from pipeline.data.tokenizer import framing
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.packing import pack
from pipeline.model.scores import read_sts
from pipeline.model.transformer import Encoder, EncoderShape, gated_width, parameter_count
from pipeline.train.checkpoints import ResumePoint, TrainState, noted_oom_splits, prune, resume_point
from pipeline.train.collectives import broadcast, rank, world_size
from pipeline.train.history import Metrics
from pipeline.train.loop import Batches, Hooks, Run, build_run, train
from pipeline.train.prefetch import to_batch
from pipeline.train.run_folder import claim_run_folder
from pipeline.train.saving import LocalSaver, load_checkpoint
from pipeline.train.stopping import is_finished, steps_of
from pipeline.train.trackers import Trackers
from pipeline.train.validation import StsPairs, Validation

if TYPE_CHECKING:
    from pipeline.model.pretrained import PretrainedEncoder  # whose libraries take seconds to import


@dataclass(frozen=True)
class Task:
    """What every worker of a run needs to know."""

    config: Config
    folder: StoragePath
    manifest: Manifest
    plan: BatchPlan
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


def build_learner(config: Config, tokenizer: Tokenizer, *, negatives: bool) -> Learner:
    """A fresh model, or a pretrained one, and the partners that the objectives need. Seed torch before.

    `negatives`: whether the records have hard negatives.
    """
    backbone = _pretrained(config) if config.model.pretrained else _unified(config, tokenizer)
    prompts = {"query": config.data.prompt("anchor"), "document": config.data.prompt("positive", "text")}
    head = Head(
        config.model.pooling,
        config.model.normalize,
        tuple(config.model.matryoshka_dims),
        tuple((name, prompt) for name, prompt in prompts.items() if prompt),
    )
    wanted = config.objective
    decoder = _decoder(config, backbone, tokenizer) if wanted.needs_decoder else None
    special = _special(tokenizer) if wanted.needs_decoder or wanted.mlm else None
    return Learner(EmbeddingModel(backbone, head), wanted, special, decoder, negatives=negatives)


def describe(learner: Learner) -> str:
    """How many parameters there are, and where."""
    whole, encoder = parameter_count(learner), parameter_count(learner.model)
    decoder = parameter_count(learner.decoder) if learner.decoder is not None else 0
    counts = {"encoder": encoder, "decoder": decoder, "heads": whole - encoder - decoder}
    listed = ", ".join(f"{count:,} in the {name}" for name, count in counts.items() if count)
    return f"{whole:,} parameters: {listed}"


def _unified(config: Config, tokenizer: Tokenizer) -> Encoder:
    wanted = config.model
    encoder = Encoder(
        EncoderShape(
            vocab_size=tokenizer.get_vocab_size(),
            dropout=wanted.dropout,
            norm_eps=wanted.epsilon,
            positions=wanted.positions,
            max_positions=config.tokenizer.max_length if wanted.positions == "learned" else None,
            **wanted.dimensions(),
        )
    )
    encoder.gradient_checkpointing = wanted.gradient_checkpointing
    if config.training.table_warmup_fraction:
        encoder.zero_residual_branches()
    return encoder


def _pretrained(config: Config) -> PretrainedEncoder:
    from pipeline.model.pretrained import load_pretrained

    backbone = load_pretrained(_place(config))
    if config.model.gradient_checkpointing:
        backbone.checkpoint_gradients()
    return backbone


def _place(config: Config) -> Path:
    """`model.pretrained` as a folder on this machine, or a name of the hub's."""
    return fetched(as_path(str(config.model.pretrained)))


def check_model(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where a tokenizer's tokens, texts or sizes of the config do not fit the model."""
    if config.objective.needs_decoder or config.objective.mlm:
        _special(tokenizer)
    if not config.model.pretrained:
        return
    from pipeline.model.pretrained import shape_of

    try:
        backbone = shape_of(_place(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {error}") from None
    table, longest, name = len(backbone.token_table.weight), config.tokenizer.max_length, config.model.pretrained
    if longest > backbone.max_positions:
        raise ConfigError(
            f"tokenizer.max_length: found {longest}; allowed with model.pretrained={name} are at most "
            f"{backbone.max_positions}"
        )
    if tokenizer.get_vocab_size() > table:
        raise ConfigError(
            f"tokenizer.load_path: found {tokenizer.get_vocab_size():,} tokens, and {table:,} rows in the table of "
            f"model.pretrained={name}; allowed is that model's own tokenizer"
        )
    if max(config.model.matryoshka_dims, default=0) >= backbone.width:
        raise ConfigError(
            f"model.matryoshka_dims: found {config.model.matryoshka_dims}; allowed are sizes below {backbone.width}"
        )


def _decoder(config: Config, backbone: Encoder | PretrainedEncoder, tokenizer: Tokenizer) -> Decoder:
    """A decoder of the encoder's width and depth, so that they can share a token table."""
    wanted, shape = config.model, config.model.dimensions()
    pretrained = not isinstance(backbone, Encoder)
    decoder = Decoder(
        DecoderShape(
            vocab_size=len(backbone.token_table.weight) if wanted.tie_embeddings else tokenizer.get_vocab_size(),
            d_model=backbone.width,
            num_layers=wanted.decoder_layers or max(len(backbone.layers), 1),
            num_heads=shape["num_heads"] if isinstance(backbone, Encoder) else backbone.num_heads,
            num_kv_heads=None if pretrained else shape["num_kv_heads"],
            d_ff=gated_width(backbone.width) if pretrained else shape["d_ff"],
            dropout=wanted.dropout,
            memory_width=backbone.width if {"seq2seq", "denoising"} & config.objective.named.keys() else None,
        ),
        tie_to=backbone.token_table if wanted.tie_embeddings else None,
    )
    decoder.gradient_checkpointing = wanted.gradient_checkpointing
    return decoder


def _special(tokenizer: Tokenizer) -> Special:
    found = framing(tokenizer)
    if found.start is None or found.end is None or found.mask is None:
        raise ConfigError(
            "tokenizer.load_path: found no tokens such as [CLS], [SEP] and [MASK], with which texts are framed and "
            "masked; allowed with seq2seq, denoising, mlm and causal objectives is a tokenizer that has them"
        )
    return Special(found.start, found.end, found.mask, found.special, tokenizer.get_vocab_size())
