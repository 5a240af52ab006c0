"""From a prepared data set to a training run, new or resumed, with and without Ray.

spec = RunSpec.of(config, folder, manifest)
state = train_or_resume(spec, feed.batches, Hooks(save=..., report=print), device)        # on every worker
state = train_locally(config, folder, manifest)             # without Ray: one process, or torchrun
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import checked
from pipeline.core.console import log
from pipeline.core.files import local_copy
from pipeline.core.lock import holder_of
from pipeline.core.path import StoragePath, as_path
from pipeline.core.tokenizer_files import bounded, encoding, parse_tokenizer
from pipeline.data.feed import LocalFeed, training_plan, validation_rows, warn_of_equal_positives
from pipeline.data.filtering import normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.plan import BatchPlan
from pipeline.data.shards import token_recipe
from pipeline.data.tokenizer import framing
from pipeline.data.tokenizing import Cutter
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.learner import Learner
from pipeline.model.lora import add_lora, matched
from pipeline.model.packing import pack
from pipeline.model.scores import read_sts
from pipeline.model.transformer import Encoder, EncoderShape, gated_width, parameter_count
from pipeline.model.views import MIN_TOKENS, Frame, Prompts, Views, has_dropout
from pipeline.training.checkpoints import ResumePoint, TrainState, noted_oom_splits, prune, resume_point
from pipeline.training.collectives import broadcast, rank, world_size
from pipeline.training.history import Metrics
from pipeline.training.loop import Batches, Hooks, Run, build_run, train
from pipeline.training.optimizer import slow_precision
from pipeline.training.prefetch import to_batch
from pipeline.training.run_folder import claim_run_folder
from pipeline.training.saving import LocalSaver, OnSaved, load_checkpoint
from pipeline.training.stopping import is_finished, steps_of
from pipeline.training.trackers import Trackers
from pipeline.training.validation import StsPairs, Validation


@dataclass(frozen=True)
class RunSpec:
    """A training run, as every worker needs it."""

    config: Config
    folder: StoragePath
    manifest: Manifest
    plan: BatchPlan
    total_steps: int
    holder: str
    """The holder of the lock on the run's folder; see `Committer`."""

    @classmethod
    def of(cls, config: Config, folder: StoragePath, manifest: Manifest) -> RunSpec:
        """Plan the batches of a prepared data set. Raises ConfigError if a split is smaller than a batch."""
        if config.model.num_layers == "auto" and not config.model.pretrained:
            raise ConfigError(
                "model.num_layers: found auto, which only pipeline.api.train and tune replace; give a number"
            )
        settings = config.training
        plan = training_plan(folder, manifest, settings.global_batch_size, settings.seed, settings.batching)
        return cls(config, folder, manifest, plan, steps_of(config, plan), holder_of(config.run_dir))

    @property
    def tokenizer_json(self) -> str:
        return checked(self.folder / "tokenizer.json").read_text(encoding="utf-8")


def train_or_resume(
    spec: RunSpec, batches: Batches, hooks: Hooks, device: torch.device, known: ResumePoint | None = None
) -> TrainState:
    """Train from the newest checkpoint, or from step 0. Raises TrainingStopped and ConfigError on all workers.

    `known` is the newest checkpoint if it was verified already.
    """
    config = spec.config
    if config.objective.teacher and spec.manifest.teacher is None:
        raise ConfigError("objective: found a teacher, but no vectors of it; call pipeline.index.teacher.with_teacher")
    if config.model.static_from and spec.manifest.initial_table is None:
        raise ConfigError(
            "model.static_from: found no table; call pipeline.index.static_table.with_initial_table first"
        )
    spec.plan.check_workers(world_size())
    torch.manual_seed(config.training.seed)
    tokenizer = parse_tokenizer(spec.tokenizer_json, spec.folder / "tokenizer.json")
    teacher, negatives = spec.manifest.teacher, "negatives" in spec.manifest.text_fields
    learner = build_learner(config, tokenizer, negatives=negatives, teacher_width=teacher.width if teacher else None)
    if spec.manifest.initial_table:
        load_initial_table(learner, as_path(spec.manifest.initial_table))
    validation = build_validation(spec, tokenizer, learner.views)
    run = build_run(config, learner, batches, validation, spec.total_steps, hooks, device)
    state = resume(run, known)
    if rank() == 0:
        log.info("train: %s", describe(run.learner))
        if slow := slow_precision(config.training.precision, device):
            log.warning("train: %s", slow)
        if learner.views and (short := _short_texts(spec.manifest, learner.views)):
            log.warning("train: %s", short)
        resumed = f", from step {state.step:,}" if state.step else ""
        log.info("train: training on %d worker%s%s", world_size(), "s" * (world_size() > 1), resumed)
    return state if is_finished(config, spec.total_steps, state) else train(run, state)


def resume(run: Run, known: ResumePoint | None = None) -> TrainState:
    """Load the newest valid checkpoint, if there is one.

    Rank 0 chooses it for all workers, which may list the disk or bucket at different moments.
    """
    run_dir = run.config.run_dir
    chosen = (resume_point(run_dir, known), noted_oom_splits(run_dir)) if rank() == 0 else None
    point, oom_splits = broadcast(chosen) or (ResumePoint(), 0)
    if point.folder:
        load_checkpoint(point.folder, run)
    point.state.oom_splits = max(point.state.oom_splits, oom_splits)
    return point.state


def train_locally(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    on_saved: OnSaved = lambda folder, state: None,
) -> TrainState:
    """Train without Ray, in this process or in a torch.distributed process group. Returns the final state.

    `on_metrics` is called on rank 0 with each row of metrics, after the trackers, and `on_saved` with each checkpoint.
    """
    spec, point = RunSpec.of(config, folder, manifest), ResumePoint()
    check_model(config, parse_tokenizer(spec.tokenizer_json, folder / "tokenizer.json"))
    if rank() == 0:
        warn_of_equal_positives(config, folder, manifest)
        claim_run_folder(config, folder, manifest, spec.total_steps)
        point = resume_point(config.run_dir)
        prune(config.run_dir, config.checkpointing.max_checkpoints, point.folder)

    def report(metrics: Metrics) -> None:
        trackers.log(metrics)
        on_metrics(metrics)

    with Trackers.open(config, point.state.step, leader=rank() == 0) as trackers:
        saver = LocalSaver(config, spec.tokenizer_json, spec.holder, trackers, on_saved)
        feed = LocalFeed(spec.plan, rank(), world_size())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return train_or_resume(spec, feed.batches, Hooks(saver.save, report, trackers.alert), device, point)


def build_validation(spec: RunSpec, tokenizer: Tokenizer, views: Views | None) -> Validation:
    """Held-out rows, and the pairs of an STS file if the config names one.

    Records without pairs get crops, also if training contrasts the same text twice: without dropout that is no task.
    """
    config, sts = spec.config, None
    rows = validation_rows(spec.folder, spec.manifest, config.training.validation_pairs)
    if config.evaluation.sts_file:
        pairs, normalise = read_sts(as_path(config.evaluation.sts_file)), normaliser(config.data)
        tokenizer.enable_truncation(config.tokenizer.max_length)
        with encoding(tokenizer):
            first, second = (
                pack([encoded.ids for encoded in tokenizer.encode_batch_fast(bounded(tokenizer, texts))])
                for texts in ([normalise(text) for text in side] for side in (pairs.first, pairs.second))
            )
        sts = StsPairs(first, second, pairs.scores)
    views = None if views is None or spec.manifest.holds_pairs else replace(views, kind="crops")
    return Validation(to_batch(rows, views=views), tokenizer.decode_batch, config.training.generated_texts, sts)


def build_learner(
    config: Config, tokenizer: Tokenizer, *, negatives: bool, teacher_width: int | None = None
) -> Learner:
    """A new or pretrained model, with the decoder and heads that the objectives need. Seed torch first.

    `negatives`: whether the records have hard negatives. `teacher_width`: the size of the teacher's vectors.
    """
    model = _pretrained(config) if config.model.pretrained else EmbeddingModel(_new_encoder(config, tokenizer))
    prompts = {"query": config.data.prompt("anchor"), "document": config.data.prompt("positive", "text")}
    model.head = replace(
        model.head,
        pooling=config.model.pooling or model.head.pooling,
        normalize=config.model.normalize,
        dimensions=tuple(config.model.matryoshka_dims),
        prompts=tuple((name, prompt) for name, prompt in prompts.items() if prompt),
    )
    objective = config.objective
    decoder = _decoder(config, model.backbone, tokenizer) if objective.needs_decoder else None
    special = _special(tokenizer) if objective.needs_decoder or objective.mlm else None
    return Learner(
        model,
        objective,
        special,
        decoder,
        negatives=negatives,
        teacher_width=teacher_width,
        views=build_views(config, tokenizer),
    )


def load_initial_table(learner: Learner, file: StoragePath) -> None:
    """Start the token table from a .npy file of (V, D) rows."""
    with checked(file).open("rb") as stream:
        rows = torch.from_numpy(np.load(stream, allow_pickle=False))
    with torch.no_grad():
        learner.model.token_table.weight.copy_(rows)


def build_views(config: Config, tokenizer: Tokenizer) -> Views | None:
    """What the contrastive objective learns from, if not from the records' pairs."""
    contrastive = config.objective.contrastive
    if contrastive is None or contrastive.views == "given":
        return None
    cutter = Cutter(tokenizer, token_recipe(config, []))

    def tokens(prompt: str) -> tuple[int, ...]:
        """A blank at the end belongs to the token of the next word, or to none."""
        with encoding(tokenizer):
            return tuple(tokenizer.encode(prompt.rstrip(), add_special_tokens=False).ids)

    prompts = {}
    for source in config.data.sources:
        document = source.prompts.get("positive", source.prompts.get("text", ""))
        if source.prompts:
            prompts[source.name] = Prompts(tokens(source.prompts.get("anchor", "")), tokens(document))
    frame = Frame(tuple(cutter.prefix), tuple(cutter.suffix), config.tokenizer.max_length)
    return Views(contrastive.views, frame, config.training.seed, prompts)


def _short_texts(manifest: Manifest, views: Views) -> str | None:
    """Why crops teach nothing, if nine texts of ten are too short for them."""
    field = "positive" if manifest.holds_pairs else "text"
    longest = manifest.lengths[field].get("p90", math.inf) - len(views.frame.before) - len(views.frame.after)
    if views.kind != "crops" or longest >= MIN_TOKENS:
        return None
    return (
        f"nine of ten texts have at most {longest:.0f} tokens, and a text of fewer than {MIN_TOKENS} is not cropped: "
        "both its views are the whole text, from which nothing can be learnt; use longer texts, or "
        "objective.contrastive.views=dropout with model.dropout=0.1"
    )


def describe(learner: Learner) -> str:
    """The number of parameters, in total, by component and trained, and whether the encoder computes padding."""
    total, encoder = parameter_count(learner), parameter_count(learner.model)
    decoder = parameter_count(learner.decoder) if learner.decoder is not None else 0
    counts = {"encoder": encoder, "decoder": decoder, "heads": total - encoder - decoder}
    listed = ", ".join(f"{count:,} in the {name}" for name, count in counts.items() if count)
    backbone = learner.model.backbone
    is_packed = isinstance(backbone, Encoder) or backbone.is_packed
    padded = "" if is_packed else f"; {backbone.model.config.model_type} runs padded, because it cannot run packed"  # type: ignore[union-attr]
    trained = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
    frozen = f"; {trained:,} of them are trained" if trained < total else ""
    return f"{total:,} parameters: {listed}{frozen}{padded}"


def _new_encoder(config: Config, tokenizer: Tokenizer) -> Encoder:
    settings = config.model
    encoder = Encoder(
        EncoderShape(
            vocab_size=tokenizer.get_vocab_size(),
            dropout=settings.dropout,
            norm_eps=settings.epsilon,
            positions=settings.positions,
            max_positions=config.tokenizer.max_length if settings.positions == "learned" else None,
            **settings.dimensions(),
        )
    )
    encoder.gradient_checkpointing = settings.gradient_checkpointing
    if config.training.table_warmup_fraction:
        encoder.zero_residual_branches()
    return encoder


def _pretrained(config: Config) -> EmbeddingModel:
    from pipeline.model.depth import keep_layers
    from pipeline.model.hf_io import open_hf_model
    from pipeline.model.pretrained import fetch

    model = open_hf_model(fetch(_pretrained_path(config)))
    if isinstance(config.model.num_layers, int):
        keep_layers(model.backbone, config.model.num_layers)
    if config.model.gradient_checkpointing and not isinstance(model.backbone, Encoder):
        model.backbone.checkpoint_gradients()  # type: ignore[operator]
    if lora := config.model.lora:
        add_lora(model.backbone, lora.rank, lora.alpha, lora.targets)
    return model


def _pretrained_path(config: Config) -> Path:
    """`model.pretrained` as a local folder, downloaded from a bucket if needed, or as a name on the Hub."""
    return local_copy(as_path(str(config.model.pretrained)))


def check_model(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the tokenizer or the config does not fit the objectives or the pretrained model."""
    if config.objective.needs_decoder or config.objective.mlm:
        _special(tokenizer)
    if not config.model.pretrained:
        return
    from pipeline.model.depth import keep_layers
    from pipeline.model.hf_io import open_hf_model
    from pipeline.model.pretrained import fetch

    try:
        model = open_hf_model(fetch(_pretrained_path(config)), weights=False)
        if config.model.gradient_checkpointing and not isinstance(model.backbone, Encoder):
            model.backbone.checkpoint_gradients()  # type: ignore[operator]
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {error}") from None
    try:
        if isinstance(config.model.num_layers, int):
            keep_layers(model.backbone, config.model.num_layers)
    except ValueError as error:
        raise ConfigError(f"model.num_layers: {error} (model.pretrained={config.model.pretrained})") from None
    backbone: Any = model.backbone
    if config.model.lora:
        try:
            matched(backbone, config.model.lora.targets)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets: {error}") from None
    table, longest, name = model.token_table.weight, config.tokenizer.max_length, config.model.pretrained
    if not isinstance(backbone, Encoder) and longest > backbone.max_positions:
        raise ConfigError(
            f"tokenizer.max_length: found {longest}; model.pretrained={name} takes at most {backbone.max_positions}"
        )
    if tokenizer.get_vocab_size() > len(table):
        raise ConfigError(
            f"tokenizer.load_path: found {tokenizer.get_vocab_size():,} tokens, but the token table of "
            f"model.pretrained={name} has {len(table):,} rows; use that model's own tokenizer"
        )
    if max(config.model.matryoshka_dims, default=0) >= model.width:
        raise ConfigError(
            f"model.matryoshka_dims: found {config.model.matryoshka_dims}; allowed are sizes below {model.width}"
        )
    shares_table = config.objective.mlm or (config.objective.needs_decoder and config.model.tie_embeddings)
    if shares_table and table.shape[1] != backbone.width:
        raise ConfigError(
            f"objective: found a token table of width {table.shape[1]} and states of width {backbone.width} in "
            f"model.pretrained={name}; mlm needs equal ones, and a decoder needs model.tie_embeddings=false"
        )
    denoising = config.objective.denoising
    if denoising and denoising.corruption == "deletion" and model.width != backbone.width:
        raise ConfigError(
            f"objective.denoising.corruption: found deletion, but model.pretrained={name} projects its vectors to "
            f"{model.width} numbers; use spans, which sees the states"
        )
    contrastive = config.objective.contrastive
    if contrastive and contrastive.views == "dropout" and not has_dropout(backbone):
        raise ConfigError(
            f"objective.contrastive.views: found dropout, but the config.json of model.pretrained={name} has none, so "
            "both views would be equal; use objective.contrastive.views=crops, or a model with hidden_dropout_prob"
        )


def _decoder(config: Config, backbone: Any, tokenizer: Tokenizer) -> Decoder:
    """A decoder with the encoder's width and depth, so that both can share a token table."""
    settings, shape = config.model, backbone.shape if isinstance(backbone, Encoder) else None
    decoder = Decoder(
        DecoderShape(
            vocab_size=len(backbone.token_table.weight) if settings.tie_embeddings else tokenizer.get_vocab_size(),
            d_model=backbone.width,
            num_layers=settings.decoder_layers or max(len(backbone.layers), 1),
            num_heads=shape.num_heads if shape else backbone.num_heads,
            num_kv_heads=shape.num_kv_heads if shape else None,
            d_ff=shape.d_ff if shape else gated_width(backbone.width),
            dropout=settings.dropout,
            memory_width=backbone.width if {"seq2seq", "denoising"} & config.objective.named.keys() else None,
        ),
        tie_to=backbone.token_table if settings.tie_embeddings else None,
    )
    decoder.gradient_checkpointing = settings.gradient_checkpointing
    return decoder


def _special(tokenizer: Tokenizer) -> Special:
    tokens = framing(tokenizer)
    if tokens.start is None or tokens.end is None or tokens.mask is None:
        raise ConfigError(
            "tokenizer.load_path: found no start, end and mask tokens such as [CLS], [SEP] and [MASK]; the seq2seq, "
            "denoising, mlm and causal objectives need a tokenizer that has them"
        )
    return Special(tokens.start, tokens.end, tokens.mask, tokens.special, tokenizer.get_vocab_size())
