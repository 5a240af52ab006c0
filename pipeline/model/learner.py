"""The module that is trained: the embedding model and the heads of its objectives; the loss is their weighted sum.

    learner = Learner(model, objective, special, decoder)
    part = learner.prepare(batch, seed=step)          # corrupted texts, shifted targets; on the CPU
    vectors, losses = learner(part)                   # vectors of the texts, for `compare`; losses by objective

Generative losses are sums over tokens: they are normalised by the global token count, which is known only after all
workers report. The corruption of a text depends on its record and the seed, not on the worker.
"""

# Shapes: n rows of a part, b of a worker, M slots for negatives, N texts, D width, E the teacher's width.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Objective, Writing
from pipeline.model.batch import Batch, GenerativeTask, MicroBatch, Sees, Special, hashes
from pipeline.model.contrastive import ContrastiveOptions, GlobalBatch, PairVectors, contrastive_loss
from pipeline.model.corruption import Tokens, delete_tokens, mask_spans, mask_tokens
from pipeline.model.decoder import Decoder, Memory
from pipeline.model.distillation import given_score_loss, score_loss, vector_loss
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.generative import MaskedHead, TokenLoss, masked_loss, shift, token_loss
from pipeline.model.packing import Layout, Packed, join
from pipeline.model.views import Views

COMPARING = ("contrastive", "distillation")  # objectives whose loss is a function of vectors, not of tokens
MAX_SCALE = 100.0  # limit of a learned inverse temperature (CLIP, section 2.5)


@dataclass(frozen=True)
class RowVectors:
    """Vectors of the texts of this worker's b rows, and the teacher's if there is one."""

    fields: dict[str, Tensor]  # (b, D) of the anchors and positives, or of the texts
    negatives: Tensor  # (b, M, D)
    keys: Tensor  # (b, 3 + M), see `PairVectors`
    teacher: dict[str, Tensor]  # (b, E) of each field and (b, M, E) of the negatives, or (b, 1 + M) `scores`

    @property
    def pairs(self) -> PairVectors:
        return PairVectors(self.fields["anchor"], self.fields["positive"], self.negatives, self.keys)

    @property
    def teacher_pairs(self) -> PairVectors | None:
        if not {"anchor", "positive"} <= self.teacher.keys():
            return None
        anchors, negatives = self.teacher["anchor"], self.teacher.get("negatives")
        if negatives is None:
            negatives = anchors.new_zeros(len(anchors), 0, anchors.shape[1])
        return PairVectors(anchors, self.teacher["positive"], negatives, self.keys)


class Learner(nn.Module):
    """The model in training. Generative objectives need `special`, and those that generate text a `decoder`.

    `negatives`: whether any record has hard negatives; if not, batches have no slots for them. `teacher_width`: E, if
    there is a teacher. `views`: what the contrastive objective learns from instead of pairs; batches must have them.
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
        teacher_width: int | None = None,
        views: Views | None = None,
    ) -> None:
        super().__init__()
        distillation = objective.distillation
        projects = distillation and distillation.loss == "vectors" and teacher_width not in (None, model.width)
        # NOTE: registered before the model, so that ddp puts it in the bucket that is sent last.
        self.projection = nn.Linear(model.width, teacher_width, bias=False) if projects and teacher_width else None
        self.model, self.objective, self.special, self.decoder = model, objective, special, decoder
        self.masked_head = MaskedHead(model.token_table.embedding_dim) if objective.mlm else None
        self.weights = {name: float(section.weight) for name, section in objective.named.items()}  # type: ignore[attr-defined]
        contrastive = objective.contrastive
        self.views = views
        self.hard_negatives = objective.hard_negatives if negatives else 0
        if contrastive:
            if contrastive.learn_temperature:
                self.log_scale = nn.Parameter(torch.tensor(-math.log(contrastive.temperature)))
            self.contrasted = ContrastiveOptions(
                contrastive.symmetric, contrastive.margin, contrastive.guide is not None, model.head.dimensions
            )
        if list(objective.named) == ["causal"]:
            model.requires_grad_(False)  # train only the decoder, and the encoder's table if the decoder shares it
            table = model.token_table
            table.requires_grad_(decoder is not None and decoder.token_table is table)

    @property
    def scale(self) -> Tensor | float:
        """One over the temperature of the contrastive objective, or of the distillation."""
        section = self.objective.contrastive or self.objective.distillation
        assert section
        if self.objective.contrastive and self.objective.contrastive.learn_temperature:
            return self.log_scale.exp().clamp(max=MAX_SCALE)
        return 1 / section.temperature

    @property
    def compares(self) -> bool:
        """Whether an objective needs the vectors of texts."""
        return any(name in self.weights for name in COMPARING)

    @property
    def compares_rows(self) -> bool:
        """Whether an objective compares the vectors of a pair with those of the other rows."""
        return "contrastive" in self.weights or self.objective.distills_scores

    @property
    def replicated(self) -> list[nn.Parameter]:
        """Parameters that only `compare` uses. Under FSDP, every worker has a copy."""
        scalars = [parameter for parameter in self.parameters() if not parameter.ndim]
        return scalars + ([] if self.projection is None else list(self.projection.parameters()))

    @property
    def stacks(self) -> list[Any]:
        """The modules that have `layers`: the encoder, and the decoder if there is one."""
        return [self.model.backbone] + ([self.decoder] if self.decoder is not None else [])

    @property
    def generative(self) -> list[str]:
        return [name for name in self.weights if name not in COMPARING]

    @property
    def writing(self) -> list[str]:
        """Objectives whose decoder generates text that can be compared with a reference."""
        return [name for name in ("seq2seq", "denoising") if name in self.weights]

    def prepare(self, batch: Batch, seed: int) -> MicroBatch:
        """Prepare a forward pass over these rows, on the CPU."""
        tasks = {name: self._task(name, batch, seed) for name in self.generative}
        filled = batch.filled_slots(self.hard_negatives)
        if not self.compares:
            return MicroBatch(len(batch), (), None, filled, torch.zeros(len(batch), 0, dtype=torch.int64), tasks)
        keys, compared = batch.keys(self.hard_negatives), batch.compared(whole="distillation" in self.weights)
        texts = reduce(join, (*compared.values(), batch.negatives))
        return MicroBatch(len(batch), tuple(compared), texts, filled, keys, tasks, batch.teacher_of_views)

    def forward(self, part: MicroBatch) -> tuple[Tensor | None, dict[str, TokenLoss]]:
        """The vectors of the part's texts (None if no objective needs them), and the losses of its tasks."""
        vectors = self.model(part.texts) if part.texts is not None else None
        return vectors, {name: self._loss(task) for name, task in part.tasks.items()}

    def embed(self, part: MicroBatch) -> Tensor:
        """(N, D) vectors of the texts of each field, then of the hard negatives."""
        assert part.texts is not None
        return self.model(part.texts)  # type: ignore[no-any-return]

    def encode(self, texts: Packed) -> Tensor:
        """(N, D) vectors of texts."""
        return self.model(texts)  # type: ignore[no-any-return]

    def rows(self, parts: Sequence[MicroBatch], vectors: Sequence[Tensor]) -> RowVectors:
        """Combine the parts of a batch, given the vectors of their texts."""
        fields = parts[0].fields
        cut = [
            each.split([*[part.rows] * len(fields), len(each) - len(fields) * part.rows])
            for part, each in zip(parts, vectors, strict=True)
        ]
        *columns, negatives = (torch.cat(column) for column in zip(*cut, strict=True))
        filled = torch.cat([part.filled for part in parts])
        teacher = {name: torch.cat([part.teacher[name] for part in parts]) for name in parts[0].teacher}
        if "negatives" in teacher:
            teacher["negatives"] = _in_slots(teacher["negatives"], filled)
        return RowVectors(
            dict(zip(fields, columns, strict=True)),
            _in_slots(negatives, filled),
            torch.cat([part.keys for part in parts]),
            teacher,
        )

    def compare(
        self, rows: RowVectors, batch: GlobalBatch | None = None, share: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses of this worker's vectors, and their metrics.

        `batch` has the pairs of all workers, if an objective compares rows, and `share` is the mean number of rows per
        worker; by default this worker is the only one.
        """
        share = share or max(len(rows.keys), 1)
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.compares_rows:
            batch = batch or GlobalBatch(rows.pairs, 0, teacher=rows.teacher_pairs)
        if "contrastive" in self.weights:
            loss, metrics = contrastive_loss(rows.pairs, self.contrasted, self.scale, batch)
            losses.append(self.weights["contrastive"] * loss)
        if "distillation" in self.weights:
            loss = self.distillation_loss(rows, batch) * len(rows.keys) / share
            losses.append(self.weights["distillation"] * loss)
            metrics = {**metrics, "distillation_loss": loss.detach()}
        return torch.stack(losses).sum(), metrics

    def distillation_loss(self, rows: RowVectors, batch: GlobalBatch | None = None) -> Tensor:
        """The mean over this worker's rows of the loss that compares them with the teacher, without its weight."""
        distillation, count = self.objective.distillation, max(len(rows.keys), 1)
        assert distillation
        if "scores" in rows.teacher:
            scores = rows.teacher["scores"] / distillation.score_temperature
            return given_score_loss(rows.pairs, scores, 1 / distillation.temperature) / count
        if distillation.loss == "scores":
            batch = batch or GlobalBatch(rows.pairs, 0, teacher=rows.teacher_pairs)
            return score_loss(rows.pairs, batch, 1 / distillation.temperature) / count
        terms = [
            vector_loss(
                self.projection(vectors) if self.projection else vectors, rows.teacher[name], distillation.distance
            )
            for name, vectors in rows.fields.items()
            if name in rows.teacher
        ]
        return torch.stack(terms).mean() / count

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


def _in_slots(negatives: Tensor, filled: Tensor) -> Tensor:
    """(b, M, D): the vectors of all rows' negatives in their slots; zeros in empty slots."""
    slots = negatives.new_zeros(*filled.shape, negatives.shape[-1])
    return slots.masked_scatter(filled[..., None], negatives)


def _packed(tokens: Tokens) -> Packed:
    return Packed(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.offsets))
