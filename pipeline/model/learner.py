"""The module that is trained: the embedding model and the heads of its objectives; the loss is their weighted sum.

    learner = Learner(model, objective, special, decoder)
    part = learner.prepare(batch, seed=step)          # corrupted texts, shifted targets; on the CPU
    vectors, losses = learner(part)                   # vectors of pairs, for `contrast`; losses by objective

Generative losses are sums over tokens: they are normalised by the global token count, which is known only after all
workers report. The corruption of a text depends on its record and the seed, not on the worker.
"""

# Shapes: n rows of a part, M slots for negatives, N texts, D width.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Objective, Writing
from pipeline.model.batch import Batch, GenerativeTask, MicroBatch, Sees, Special, hashes
from pipeline.model.contrastive import ContrastiveOptions, GlobalBatch, PairVectors, contrastive_loss
from pipeline.model.corruption import Tokens, delete_tokens, mask_spans, mask_tokens
from pipeline.model.decoder import Decoder, Memory
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.generative import MaskedHead, TokenLoss, masked_loss, shift, token_loss
from pipeline.model.packing import Layout, Packed

MAX_SCALE = 100.0  # limit of a learned inverse temperature (CLIP, section 2.5)


class Learner(nn.Module):
    """The model in training. Generative objectives need `special`, and those that generate text a `decoder`.

    `negatives`: whether any record has hard negatives; if not, batches have no slots for them.
    """

    entries = ("embed", "encode", "loss", "write")
    """Methods other than `forward` that use weights. None calls another, because FSDP gathers weights at each call."""

    def __init__(
        self,
        model: EmbeddingModel,
        objective: Objective,
        special: Special | None = None,
        decoder: Decoder | None = None,
        *,
        negatives: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.special, self.decoder = model, objective, special, decoder
        self.masked_head = MaskedHead(model.token_table.embedding_dim) if objective.mlm else None
        self.weights = {name: float(section.weight) for name, section in objective.named.items()}  # type: ignore[attr-defined]
        contrastive = objective.contrastive
        self.contrasts = contrastive is not None
        self.hard_negatives = contrastive.hard_negatives if contrastive and negatives else 0
        if contrastive:
            if contrastive.learn_temperature:
                self.log_scale = nn.Parameter(torch.tensor(-math.log(contrastive.temperature)))
            self.contrasted = ContrastiveOptions(
                contrastive.symmetric, contrastive.false_negative_margin, model.head.dimensions
            )
        if list(objective.named) == ["causal"]:
            model.requires_grad_(False)  # train only the decoder, and the encoder's table if the decoder shares it
            table = model.token_table
            table.requires_grad_(decoder is not None and decoder.token_table is table)

    @property
    def scale(self) -> Tensor | float:
        """One over the temperature of the contrastive objective."""
        assert self.objective.contrastive
        if self.objective.contrastive.learn_temperature:
            return self.log_scale.exp().clamp(max=MAX_SCALE)
        return 1 / self.objective.contrastive.temperature

    @property
    def stacks(self) -> list[Any]:
        """The modules that have `layers`: the encoder, and the decoder if there is one."""
        return [self.model.backbone] + ([self.decoder] if self.decoder is not None else [])

    @property
    def generative(self) -> list[str]:
        return [name for name in self.weights if name != "contrastive"]

    @property
    def writing(self) -> list[str]:
        """Objectives whose decoder generates text that can be compared with a reference."""
        return [name for name in ("seq2seq", "denoising") if name in self.weights]

    def prepare(self, batch: Batch, seed: int) -> MicroBatch:
        """Prepare a forward pass over these rows, on the CPU."""
        pairs = batch.pairs() if self.contrasts else None
        keys = batch.keys(self.hard_negatives) if self.contrasts else torch.zeros(len(batch), 0, dtype=torch.int64)
        tasks = {name: self._task(name, batch, seed) for name in self.generative}
        return MicroBatch(len(batch), pairs, batch.filled_slots(self.hard_negatives), keys, tasks)

    def forward(self, part: MicroBatch) -> tuple[Tensor | None, dict[str, TokenLoss]]:
        """The vectors of the part's pairs (None without a contrastive objective), and the losses of its tasks."""
        vectors = self.model(part.pairs) if part.pairs is not None else None
        return vectors, {name: self._loss(task) for name, task in part.tasks.items()}

    def embed(self, part: MicroBatch) -> Tensor:
        """(N, D) vectors of anchors, positives and hard negatives."""
        assert part.pairs is not None
        return self.model(part.pairs)  # type: ignore[no-any-return]

    def encode(self, texts: Packed) -> Tensor:
        """(N, D) vectors of texts."""
        return self.model(texts)  # type: ignore[no-any-return]

    def rows(self, parts: Sequence[MicroBatch], vectors: Sequence[Tensor]) -> PairVectors:
        """Combine the parts of a batch, given the vectors of their pairs."""
        cut = [
            each.split([part.rows, part.rows, len(each) - 2 * part.rows])
            for part, each in zip(parts, vectors, strict=True)
        ]
        anchors, positives, negatives = (torch.cat(column) for column in zip(*cut, strict=True))
        filled = torch.cat([part.filled for part in parts])
        slots = negatives.new_zeros(*filled.shape, negatives.shape[-1]).masked_scatter(filled[..., None], negatives)
        return PairVectors(anchors, positives, slots, torch.cat([part.keys for part in parts]))

    def contrast(self, rows: PairVectors, batch: GlobalBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted contrastive loss of this worker's rows of a global batch, and its metrics."""
        loss, metrics = contrastive_loss(rows, self.contrasted, self.scale, batch)
        return self.weights["contrastive"] * loss, metrics

    def loss(self, task: GenerativeTask) -> TokenLoss:
        """The loss of a generative task, summed over its labels."""
        return self._loss(task)

    def write(self, task: GenerativeTask, max_new_tokens: int) -> list[list[int]]:
        """Generate a list of tokens for each of a task's texts, by greedy decoding."""
        assert self.decoder is not None
        assert self.special is not None
        return self.decoder.generate(self._memory(task), self.special.start, self.special.end, max_new_tokens)

    def _loss(self, task: GenerativeTask) -> TokenLoss:
        if task.inputs is None:
            assert self.masked_head is not None
            assert task.source is not None
            assert task.positions is not None
            states = self.model.hidden(task.source, Layout.of(task.source))
            table = self.model.token_table.weight
            return masked_loss(self.masked_head, states, table, task.positions, task.labels)
        assert self.decoder is not None
        states = self.decoder.hidden(task.inputs, self._memory(task))
        return token_loss(states, self.decoder.output_table, task.labels, label_smoothing=task.label_smoothing)

    def _memory(self, task: GenerativeTask) -> Memory | None:
        if task.source is None:
            return None
        layout = Layout.of(task.source)
        states = self.model.hidden(task.source, layout)
        return Memory(states, layout) if task.sees == "states" else Memory.of_vectors(self.model.pooled(states, layout))

    def _task(self, name: str, batch: Batch, seed: int) -> GenerativeTask:
        if name == "seq2seq":
            assert self.objective.seq2seq
            return self._written(batch.fields["positive"], batch.fields["anchor"], "states", self.objective.seq2seq)
        if name == "causal":
            assert self.objective.causal
            return self._written(batch.text, None, "nothing", self.objective.causal)
        text, keys = batch.text, np.array(hashes(batch.text), dtype=np.uint64)
        tokens = Tokens(text.ids.numpy(), text.offsets.numpy())
        assert self.special is not None
        special, mask, kept = self.special, self.special.mask, self.special.kept
        if name == "mlm":
            assert self.objective.mlm
            masked = mask_tokens(
                tokens,
                keys,
                seed,
                mask_id=mask,
                vocab_size=special.vocab_size,
                special=kept,
                ratio=self.objective.mlm.ratio,
            )
            labels, positions = (torch.from_numpy(each) for each in (masked.labels, masked.positions))
            return GenerativeTask(labels, _packed(masked.tokens), positions=positions)
        denoising = self.objective.denoising
        assert denoising
        if denoising.corruption == "deletion":
            left = delete_tokens(tokens, keys, seed, special=kept, ratio=denoising.ratio)
            return self._written(text, _packed(left), "vectors", denoising)
        spans = mask_spans(
            tokens, keys, seed, mask_id=mask, special=kept, density=denoising.ratio, mean_span=denoising.mean_span
        )
        return self._written(_packed(spans.targets), _packed(spans.inputs), "states", denoising)

    def _written(self, target: Packed, source: Packed | None, sees: Sees, section: Writing) -> GenerativeTask:
        assert self.special is not None
        inputs, labels = shift(target, self.special.start, self.special.end)
        return GenerativeTask(labels, source, sees, inputs, label_smoothing=section.label_smoothing)


def _packed(tokens: Tokens) -> Packed:
    return Packed(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.offsets))
