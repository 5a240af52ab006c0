"""What benchmarks/gpu.py runs: models of known sizes, pairs of random tokens in real lengths, training's own step.

    learner = learner_of(shape_of("base"), torch.device("cuda"))
    trainer = Trainer(learner, "bf16", torch.device("cuda"))
    batch = to_batch(pairs("descriptions", 64, vocab_size=32_000, seed=0))
    trainer.step([to_device(learner.prepare(batch, seed=0), "cuda")])

Every other of an anchor's tokens is one of its positive's, so that there is something to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.config import Objective
from pipeline.config.model import NORM_EPS, SIZES
from pipeline.config.training import Training
from pipeline.model.batch import MicroBatch
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.training.optimizer import Precision, build_optimizer
from pipeline.training.step import StepResult, backward
from pipeline.training.strategy import DataParallel

SHAPES: dict[str, dict[str, Any]] = {
    "base": SIZES["base"] | {"vocab_size": 32_000},
    "small": SIZES["small"] | {"vocab_size": 30_522},  # BERT's; it then has MiniLM's parameters
    "toy": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "vocab_size": 1_000},
}

LEVELS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1)
SYNOPSES = (3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21, 23, 71)
DESCRIPTIONS = (14, 29, 33, 42, 50, 58, 68, 80, 93, 114, 152, 192, 250, 308, 512)
PARAGRAPHS = (22, 31, 35, 43, 50, 58, 66, 76, 90, 110, 151, 204, 321, 486, 512)
"""Tokens, at LEVELS of the distribution: of 20,000 Debian packages' short and long descriptions, and of 20,000 of the
paragraphs of 20 words or more in Linux's documentation. BERT's vocabulary, [CLS] and [SEP] included, cut at 512;
measured on 2026-11-26."""
WHOLE = (512,) * len(LEVELS)

TEXTS = {"512": (WHOLE, WHOLE), "descriptions": (SYNOPSES, DESCRIPTIONS), "paragraphs": (PARAGRAPHS, PARAGRAPHS)}
"""Quantiles of the lengths of anchors and positives."""


def pairs(texts: str, count: int, vocab_size: int, seed: int) -> pa.Table:
    """`id`, `anchor` and `positive` of so many pairs, as training's feed brings them."""
    chance = np.random.default_rng(seed)
    anchors, positives = (_lengths(quantiles, count, chance) for quantiles in TEXTS[texts])
    tokens = chance.integers(0, vocab_size, positives.sum(), dtype=np.int32)
    starts, choices = (np.repeat(each, anchors) for each in (positives.cumsum() - positives, positives))
    drawn = tokens[starts + (chance.random(len(choices)) * choices).astype(np.int64)]
    drawn[::2] = chance.integers(0, vocab_size, len(drawn[::2]))
    ids = pa.array([f"{seed}-{row}" for row in range(count)])
    return pa.table({"id": ids, "anchor": _lists(drawn, anchors), "positive": _lists(tokens, positives)})


def _lengths(quantiles: Sequence[int], count: int, chance: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.interp(chance.random(count), LEVELS, quantiles).round().astype(np.int64)


def _lists(tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))


def shape_of(size: str) -> EncoderShape:
    """An encoder of SHAPES, with an ordinary norm."""
    return EncoderShape(norm_eps=NORM_EPS, **SHAPES[size])


def learner_of(shape: EncoderShape, device: torch.device, dropout: float = 0.0) -> Learner:
    """A contrastive learner in training mode: the same weights each time it is made on the same device."""
    torch.manual_seed(0)
    model = EmbeddingModel(Encoder(replace(shape, dropout=dropout)), Head())
    return Learner(model, Objective(), negatives=False).to(device).train()


def encoder_of(learner: Learner) -> Encoder:
    assert isinstance(learner.model.backbone, Encoder)
    return learner.model.backbone


class Trainer:
    """A learner, its optimizer and its precision; `step` is a step of pipeline/training/loop.py, for one worker."""

    def __init__(self, learner: Learner, precision: str, device: torch.device) -> None:
        settings = Training(learning_rate=1e-5)  # so small that losses do not vanish within a check's steps
        self.learner, self.precision = learner, Precision(precision, device)
        self.strategy, self.max_norm = DataParallel(), settings.max_grad_norm
        self.strategy.attach(learner)
        self.optimizer = build_optimizer(learner, settings)

    def step(self, parts: Sequence[MicroBatch]) -> tuple[StepResult, bool]:
        """The outcome, and whether the weights were updated: not where a gradient is no finite number."""
        precision = self.precision
        outcome = backward(
            self.learner, self.strategy, parts, autocast=precision.autocast, loss_scale=precision.loss_scale
        )
        precision.unscale(self.optimizer)
        finite = math.isfinite(float(self.strategy.clip(self.max_norm))) and not outcome.bad_losses
        if finite:
            precision.step(self.optimizer)
        else:
            precision.skip()
        return outcome, finite
