"""The `training`, `checkpointing` and `scaling` sections: how a model is trained, kept and spread over workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section, Share


class EarlyStopping(Section):
    patience: int | None = Field(None, ge=1)
    """Stop after so many validations in a row without a better one; by default never."""
    min_delta: float = Field(0.0, ge=0)
    """A validation counts as better where the metric has improved by more than this."""


class Training(Section):
    global_batch_size: int = Field(256, ge=2)
    """Pairs an optimizer step, over all workers."""
    batching: Literal["mixed", "by_source"] = "mixed"
    """mixed: a global batch has records of all sources. by_source: of one source, drawn by the sources' weights, so
    that negatives within the batch are of its own kind (Nomic Embed, section 3.2.2)."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches a worker's share is cut into. Gradients are cached, so each anchor still meets all negatives."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens of a micro-batch at most, so that long texts fit into memory; a longer record is a micro-batch itself."""
    learning_rate: float = Field(1e-3, gt=0, le=10)
    """AdamW's peak rate for the layers."""
    table_learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak rate for the token table; by default `learning_rate`."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """AdamW's decoupled decay, on weight matrices alone: none on norms, biases and the token table."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.98]
    """AdamW's decay of both moments. RoBERTa's (section 3.1): a rare token's second moment is not forgotten slower than
    it occurs."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """How the rate falls after its warm-up: along a line or a cosine, not until the last `decay_fraction` of the steps
    (warm-up, stable, decay; MiniCPM, section 4), or not at all."""
    warmup_fraction: Share = 0.05
    """Share of the steps over which the rate rises from zero."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the rate rises, in place of `warmup_fraction`."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """Share of the steps over which schedule=wsd lets the rate fall (MiniCPM, section 4.3)."""
    final_rate_fraction: Share = 0.05
    """Share of its peak that the rate has fallen to at the end."""
    table_warmup_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the steps in which the token table trains alone, before the layers join in (model/transformer.py)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps."""
    max_epochs: float | None = Field(None, gt=0)
    """Stop after so many passes over the training split; 3 where max_steps is not set either."""
    max_time_s: float | None = Field(None, gt=0)
    """Stop after so many seconds of training, all starts of the run together, with a checkpoint. Looked at every
    `log_every_steps`."""
    early_stopping: EarlyStopping = EarlyStopping()
    best_metric: str | None = None
    """Validation metric that the best model has the best of, such as `sts_spearman`; of names with loss, nll or
    perplexity the lowest, else the highest. By default NDCG@10 of pairs, else the loss."""
    compile: bool = False
    """Compile the model with torch.compile: minutes before the first step, faster steps after it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast where the GPU has it, else fp32. fp16: autocast with a scaled loss."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How workers share the model. ddp: each holds a copy. fsdp: each holds a part of the weights, of their gradients
    and of the optimizer's state (torch's fully_shard)."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """Type in which ddp sends gradients to the other workers; bf16 needs GPUs (nccl)."""
    max_skipped_steps: int = Field(10, ge=1)
    """Stop after so many steps in a row whose loss or gradient is no finite number; each is skipped by all workers."""
    validate_every_steps: int = Field(200, ge=1)
    """Steps between validations."""
    validation_pairs: int = Field(2048, ge=2)
    """At most so many validation records are scored: pairs are ranked against each other."""
    generated_texts: int = Field(64, ge=0)
    """At most so many validation texts are generated for BLEU and ROUGE, where an objective trains a decoder."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines in metrics.jsonl."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, data order and dropout."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Training:
        if self.gradient_compression != "none" and self.strategy == "fsdp":
            raise ValueError("gradient_compression with strategy=ddp alone, not with fsdp")
        if self.gradient_compression != "none" and self.precision == "fp16":
            raise ValueError("gradient_compression without precision=fp16, whose scaled gradients may not fit 16 bits")
        return self


class Checkpointing(Section):
    every_steps: int = Field(200, ge=1)
    """Steps between checkpoints; one is also written at the end, on SIGTERM and on notice of preemption."""
    every_minutes: float | None = Field(None, gt=0)
    """Also after so many minutes of training without one; looked at every `training.log_every_steps`."""
    max_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept; the best by `training.best_metric` is kept beside them."""
    accept_changes: list[str] = []
    """Keys in which a run may differ from what it was started with, such as [training.learning_rate, data]; `data` is
    the prepared data set."""
    grace_s: float = Field(60.0, gt=0)
    """Seconds that SIGTERM and Ctrl-C wait for the last checkpoint before the job ends without it."""


class Labels(Section):
    """Labels of the nodes, as of `ray start --labels pool=gpu`, that work goes to; by default to any node."""

    data: dict[str, str] = {}
    """Of nodes that read, judge, tokenize and write: prepare, the feed of training, what comes before encoding."""
    train: dict[str, str] = {}
    """Of nodes with training workers."""
    encode: dict[str, str] = {}
    """Of nodes with encoding actors; by default those of `data`, whose keys it must have."""

    @model_validator(mode="after")
    def _keys_of_data(self) -> Labels:
        if self.encode and (missing := self.data.keys() - self.encode.keys()):  # Ray Data joins the two, key by key
            raise ValueError(f"encode with a value for each key of data, {', '.join(sorted(missing))} too")
        return self


class Scaling(Section):
    num_workers: (
        Literal["auto"]
        | Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    ) = "auto"
    """Training workers: a number, or [fewest, most], between which Ray follows the cluster's size. auto: one a GPU,
    else two."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs a training worker reserves. Half a CPU each leaves Ray Data a whole one of two."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs a training worker reserves. auto: 1 where the cluster has GPUs, else 0."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the workers, each from the newest checkpoint, before a run gives up; those for preempted nodes do not
    count."""
    collective_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a worker waits for the others before it counts as hung, and all are restarted."""
    resize_every_s: float = Field(60.0, gt=0)
    """Seconds between two looks at the cluster's size, where `num_workers` is a range."""
    placement: Literal["pack", "spread"] = "pack"
    """Training workers on as few nodes as they fit on, or each on another one, as far as there are nodes."""
    labels: Labels = Labels()
    """Which nodes do what, where they are of several kinds."""

    @model_validator(mode="after")
    def _range_rises(self) -> Scaling:
        if isinstance(self.num_workers, list) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers as [fewest, most], not {self.num_workers}")
        return self
