"""The `training`, `checkpointing` and `scaling` sections: how a model is trained, saved and distributed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section, Share


class EarlyStopping(Section):
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations in a row without improvement; by default never."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest improvement of the metric that counts."""


class Training(Section):
    global_batch_size: int = Field(256, ge=2)
    """Pairs per optimizer step, over all workers. With fewer training records than that, a quarter of them."""
    batching: Literal["mixed", "by_source"] = "mixed"
    """mixed: a global batch has records of all sources. by_source: of one source, sampled by the sources' weights, so
    that in-batch negatives come from the same source (Nomic Embed, section 3.2.2)."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per worker and step. Gradients are cached (GradCache), so each anchor still sees all negatives."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Maximum tokens per micro-batch, so that long texts fit in memory; a longer record gets its own micro-batch."""
    learning_rate: float = Field(1e-3, gt=0, le=10)
    """AdamW's peak learning rate, for the layers."""
    table_learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak learning rate for the token embeddings; by default `learning_rate`."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """AdamW's decoupled weight decay, on weight matrices only, not on norms, biases and token embeddings."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.98]
    """AdamW's betas. RoBERTa's (section 3.1), whose second moment adapts faster, which suits rare tokens."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """How the learning rate decays after the warm-up: linearly, along a cosine, in the last `decay_fraction` of the
    steps (wsd: warm-up, stable, decay; MiniCPM, section 4), or not at all."""
    warmup_fraction: Share = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warm-up in steps, instead of `warmup_fraction`."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """Share of the steps over which schedule=wsd decays the learning rate (MiniCPM, section 4.3)."""
    final_rate_fraction: Share = 0.05
    """Final learning rate, as a share of the peak."""
    table_warmup_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the steps that train only the token embeddings, before the layers (model/transformer.py)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    max_epochs: float | None = Field(None, gt=0)
    """Stop after this many epochs; 3 if max_steps is not set either."""
    max_time_s: float | None = Field(None, gt=0)
    """Stop, with a checkpoint, after this many seconds of training, over all restarts of the run. Checked every
    `log_every_steps`."""
    early_stopping: EarlyStopping = EarlyStopping()
    best_metric: str | None = None
    """Validation metric that selects the best model, such as `sts_spearman`. Lower is better for names with loss, nll
    or perplexity, else higher. Default: NDCG@10 of pairs, else the loss."""
    compile: bool = False
    """Compile the model with torch.compile: minutes before the first step, then faster steps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast if the GPU supports it, else fp32. fp16: autocast with a scaled loss. A processor without
    instructions for bf16 or fp16 emulates them, many times slower than fp32; a warning says so."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds a copy of the model. fsdp: each worker holds a shard of the weights, gradients and
    optimizer state (torch's fully_shard)."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """Data type in which ddp all-reduces gradients; bf16 needs GPUs (nccl)."""
    max_skipped_steps: int = Field(10, ge=1)
    """Stop after this many steps in a row whose loss or gradient is NaN or infinite; all workers skip such a step."""
    validate_every_steps: int = Field(200, ge=1)
    """Steps between validations."""
    validation_pairs: int = Field(2048, ge=2)
    """Maximum validation records to score; their distinct positives are ranked for each anchor."""
    generated_texts: int = Field(64, ge=0)
    """Maximum validation texts to generate for BLEU and ROUGE, if an objective trains a decoder."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines in metrics.jsonl."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, data order and dropout."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Training:
        if self.gradient_compression != "none" and self.strategy == "fsdp":
            raise ValueError("gradient_compression only with strategy=ddp, not with fsdp")
        if self.gradient_compression != "none" and self.precision == "fp16":
            raise ValueError("gradient_compression without precision=fp16, whose scaled gradients may not fit 16 bits")
        return self


class Checkpointing(Section):
    every_steps: int = Field(200, ge=1)
    """Steps between checkpoints; one is also written at the end, on SIGTERM and on a preemption notice."""
    every_minutes: float | None = Field(None, gt=0)
    """Also write a checkpoint after this many minutes without one; checked every `training.log_every_steps`."""
    max_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best by `training.best_metric`."""
    accept_changes: list[str] = []
    """Keys that may differ from the config the run started with, such as [training.learning_rate, data]; `data` is
    the prepared data set."""
    grace_s: float = Field(60.0, gt=0)
    """Seconds to wait for the last checkpoint after SIGTERM or Ctrl-C."""


class Labels(Section):
    """Labels of the nodes for each kind of work, as in `ray start --labels pool=gpu`; by default any node."""

    data: dict[str, str] = {}
    """Nodes that read, filter, tokenize and write: in prepare, for training's input, and before encoding."""
    train: dict[str, str] = {}
    """Nodes that run training workers."""
    encode: dict[str, str] = {}
    """Nodes that run encoding actors; by default those of `data`. Must have a value for each key of `data`."""

    @model_validator(mode="after")
    def _keys_of_data(self) -> Labels:
        if self.encode and (missing := self.data.keys() - self.encode.keys()):  # Ray Data joins the two, key by key
            raise ValueError(f"an encode that also has a value for {', '.join(sorted(missing))}, as data has")
        return self


class Scaling(Section):
    num_workers: (
        Literal["auto"]
        | Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    ) = "auto"
    """Training workers: a number, or [fewest, most] to follow the cluster's size. auto: one per GPU, or two without
    GPUs."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs reserved per training worker. With the default, two workers on two CPUs leave one for Ray Data."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs reserved per training worker. auto: 1 if the cluster has GPUs, else 0."""
    max_failures: int = Field(3, ge=0)
    """Worker restarts, each from the newest checkpoint, before a run fails; preempted nodes do not count."""
    collective_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a worker may keep the others waiting before it counts as hung and all workers restart."""
    resize_every_s: float = Field(60.0, gt=0)
    """Seconds between checks of the cluster's size, if `num_workers` is a range."""
    placement: Literal["pack", "spread"] = "pack"
    """pack: workers on as few nodes as possible. spread: on as many as possible."""
    labels: Labels = Labels()
    """Which nodes do which work, in a cluster with several kinds of nodes."""

    @model_validator(mode="after")
    def _range_rises(self) -> Scaling:
        if isinstance(self.num_workers, list) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers as [fewest, most], not {self.num_workers}")
        return self
