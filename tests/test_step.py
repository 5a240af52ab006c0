"""One step's gradients: of hybrid objectives, in micro-batches, on several workers; each against one plain pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config import Objective
from pipeline.model.batch import Batch, Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.packing import pack
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.model.views import Frame, Views
from pipeline.training.step import StepResult, backward, micro_batch_ranges
from pipeline.training.strategy import MAX_FLAGS, DataParallel, _Bucket
from tests.gloo_workers import Result, run_workers

ROWS = 8
PARTS: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "norm_eps": 1e-5}
SPECIAL = Special(start=2, end=3, mask=4, kept=frozenset(range(5)), vocab_size=40)
CONTRASTIVE = {"hard_negatives": 2, "learn_temperature": True, "temperature": 0.1, "false_negative_margin": 0.3}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "contrastive": {"contrastive": CONTRASTIVE},
    "seq2seq": {"seq2seq": {"label_smoothing": 0.1}},
    "hybrid": {
        "contrastive": CONTRASTIVE,
        "seq2seq": {"weight": 0.5},
        "denoising": {"weight": 0.3},
        "mlm": {"weight": 0.2},
        "causal": {"weight": 0.1},
    },
    "spans": {"denoising": {"corruption": "spans", "ratio": 0.3}},
    "guided": {"contrastive": {**CONTRASTIVE, "guide": "teacher"}},
    "vectors": {"distillation": {"teacher": "teacher", "distance": "l2"}},
    "scores": {"distillation": {"teacher": "teacher", "loss": "scores", "temperature": 0.2, "hard_negatives": 2}},
    "taught": {
        "contrastive": {**CONTRASTIVE, "guide": "teacher"},
        "distillation": {"teacher": "teacher", "weight": 0.7},
        "mlm": {"weight": 0.2},
    },
    "crops": {"contrastive": {**CONTRASTIVE, "views": "crops"}, "denoising": {"weight": 0.3}, "mlm": {"weight": 0.2}},
    "dropout": {"contrastive": {**CONTRASTIVE, "views": "dropout"}},
    "taught crops": {
        "contrastive": {**CONTRASTIVE, "views": "crops"},
        "distillation": {"teacher": "teacher", "weight": 0.7},
    },
}
TEACHER_WIDTH = 12


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def learner_of(name: str, dropout: float = 0.0) -> Learner:
    """A learner whose every parameter does something, in float64."""
    objective = Objective.model_validate(OBJECTIVES[name])
    torch.manual_seed(0)
    with float64():
        encoder = Encoder(EncoderShape(**PARTS, dropout=dropout))
        shape = DecoderShape(**PARTS, dropout=dropout, memory_width=16)
        decoder = Decoder(shape, encoder.token_table) if objective.needs_decoder else None
        kind = objective.contrastive.views if objective.contrastive else "given"
        views = None if kind == "given" else Views(kind, Frame((2,), (3,), 64), seed=0)
        model = EmbeddingModel(encoder, Head(dimensions=(8, 4)))
        learner = Learner(model, objective, SPECIAL, decoder, teacher_width=TEACHER_WIDTH, views=views)
        for parameter in learner.parameters():
            if parameter.ndim:
                torch.nn.init.normal_(parameter, std=0.3)
    return learner.train()


def batch() -> Batch:
    """Eight pairs of mixed length with none, one or two negatives, and a teacher's vectors of them.

    Two rows share an anchor, two a positive.
    """
    chance = torch.Generator().manual_seed(3)

    def text() -> list[int]:
        length = int(torch.randint(2, 9, (1,), generator=chance))
        return torch.randint(5, 40, (length,), generator=chance).tolist()

    anchors, positives = [text() for _ in range(ROWS)], [text() for _ in range(ROWS)]
    anchors[5], positives[6] = anchors[2], positives[1]
    counts = [row % 3 for row in range(ROWS)]
    negatives = [text() for _ in range(sum(counts))]
    fields = {"anchor": pack(anchors), "positive": pack(positives)}
    teacher = {
        name: torch.randn(rows, TEACHER_WIDTH, generator=chance, dtype=torch.float64)
        for name, rows in (("anchor", ROWS), ("positive", ROWS), ("negatives", sum(counts)))
    }
    return Batch([f"r{row}" for row in range(ROWS)], fields, pack(negatives), counts, teacher=teacher)


def batch_for(learner: Learner) -> Batch:
    """`batch`, or texts with the views that the learner contrasts; two rows have the same text."""
    if learner.views is None:
        return batch()
    chance = torch.Generator().manual_seed(4)
    sizes = torch.randint(12, 40, (ROWS,), generator=chance).tolist()
    texts = [[2, *torch.randint(5, 40, (size,), generator=chance).tolist(), 3] for size in sizes]
    texts[5] = texts[2]
    teacher = {"text": torch.randn(ROWS, TEACHER_WIDTH, generator=chance, dtype=torch.float64)}
    rows = Batch([f"r{row}" for row in range(ROWS)], {"text": pack(texts)}, pack([]), [0] * ROWS, teacher=teacher)
    return learner.views.of(rows, ["s"] * ROWS, epoch=3)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def whole_gradients(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients and metrics of the plain loss over the whole batch: one graph, one process, autograd alone."""
    learner = learner_of(name)
    part = learner.prepare(batch_for(learner), 7)
    vectors, losses = learner(part)
    terms = [learner.weights[task] * loss.sum / loss.count for task, loss in losses.items()]
    metrics = {f"{task}_nll": loss.nll / loss.count for task, loss in losses.items()}
    if vectors is not None:
        contrast, found = learner.compare(learner.rows([part], [vectors]))
        terms.append(contrast)
        metrics |= found
    loss = torch.stack(terms).sum()
    loss.backward()
    return gradients(learner), metrics | {"loss": loss.detach()}


def step(learner: Learner, rows: Batch, micro_batches: int = 1, strategy: DataParallel | None = None) -> StepResult:
    """A step as the loop makes it."""
    strategy = strategy or DataParallel()
    strategy.attach(learner)
    return backward(
        learner, strategy, [learner.prepare(rows.slice(*ends), 7) for ends in micro_batch_ranges(rows, micro_batches)]
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """Or the tests below would compare nothing."""
    found, metrics = whole_gradients(name)
    assert set(found) == {n for n, p in learner_of(name).named_parameters() if p.requires_grad}
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())
    assert bool(torch.isfinite(metrics["loss"]))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_micro_batches_give_the_whole_batch_gradient(name: str, micro_batches: int) -> None:
    expected, whole_metrics = whole_gradients(name)
    learner = learner_of(name)
    metrics = step(learner, batch_for(learner), micro_batches).metrics
    assert_equal(gradients(learner), expected)
    assert metrics.keys() == whole_metrics.keys()
    for key in metrics:
        assert float(metrics[key]) == pytest.approx(float(whole_metrics[key]), abs=1e-9), key


def test_cuts() -> None:
    rows = batch()
    sizes = rows.row_tokens
    assert sum(sizes) == rows.tokens
    assert sizes[1] == len(rows.fields["anchor"].slice(1, 2).ids) + len(rows.fields["positive"].slice(1, 2).ids) + len(
        rows.negatives.slice(0, 1).ids
    )
    assert micro_batch_ranges(rows) == [(0, 8)]
    assert micro_batch_ranges(rows, 3) == [(0, 2), (2, 5), (5, 8)]
    assert micro_batch_ranges(rows, 2, oom_splits=1) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert micro_batch_ranges(rows, 100) == [(i, i + 1) for i in range(8)]
    most = max(sizes) + 5
    for ranges in (micro_batch_ranges(rows, max_tokens=most), micro_batch_ranges(rows, 2, most, oom_splits=1)):
        assert [row for ends in ranges for row in range(*ends)] == list(range(8))
    assert all(sum(sizes[a:b]) <= most for a, b in micro_batch_ranges(rows, max_tokens=most))
    assert micro_batch_ranges(rows, max_tokens=1) == [(i, i + 1) for i in range(8)]


@pytest.mark.parametrize("name", ["contrastive", "hybrid", "taught", "scores", "crops", "dropout"])
def test_cached_gradients_replay_dropout(name: str) -> None:
    """The cached gradient must be that of the very masks the first pass drew: one graph over all parts tells it."""
    learner = learner_of(name, dropout=0.3)
    torch.manual_seed(5)
    step(learner, batch_for(learner), 2)
    found = gradients(learner)

    learner.zero_grad()
    parts = [learner.prepare(batch_for(learner).slice(start, start + 4), 7) for start in (0, 4)]
    torch.manual_seed(5)
    states = []
    with torch.no_grad():
        for part in parts:
            states.append(torch.get_rng_state())
            learner.embed(part)
    outputs = []
    for part, state in zip(parts, states, strict=True):
        torch.set_rng_state(state)
        outputs.append(learner(part))
    loss, _ = learner.compare(learner.rows(parts, [vectors for vectors, _ in outputs]))
    for task in learner.generative:
        losses = [tasks[task] for _, tasks in outputs]
        loss = loss + learner.weights[task] * sum(each.sum for each in losses) / sum(each.count for each in losses)
    loss.backward()
    assert_equal(found, gradients(learner))


def _share(rank: int, world_size: int, name: str, micro_batches: int) -> Result:
    """Rank 0's gradients after the reduction, and how many elements of gradients and flags were sent."""
    learner, sent = learner_of(name), 0
    send = _Bucket.send

    def count(bucket: _Bucket) -> None:
        nonlocal sent
        sent += bucket.flat.numel()
        send(bucket)

    _Bucket.send = count  # type: ignore[method-assign]
    bounds = [round(ROWS * share / sum(SHARES[world_size])) for share in (0, *accumulate(SHARES[world_size]))]
    metrics = step(learner, batch_for(learner).slice(bounds[rank], bounds[rank + 1]), micro_batches).metrics
    means = {key: value.clone().double() for key, value in metrics.items()}
    for value in means.values():
        dist.all_reduce(value)
    means = {f"metric {key}": value / world_size for key, value in means.items()}
    return {"sent": torch.tensor(sent), **means, **gradients(learner)}


SHARES = {2: (1, 1), 3: (2, 4, 2), 4: (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("world_size", "name", "micro_batches"),
    [
        (2, "hybrid", 2),
        (4, "hybrid", 1),
        (4, "contrastive", 2),
        (3, "hybrid", 2),
        (2, "scores", 2),
        (3, "taught", 2),
        (4, "taught", 1),
        (4, "vectors", 2),
        (2, "crops", 2),
        (4, "crops", 1),
        (4, "dropout", 2),
        (2, "taught crops", 2),
    ],
)
def test_workers_give_the_single_process_gradient_in_one_reduction(
    world_size: int, name: str, micro_batches: int
) -> None:
    """With hard negatives, masks, a learned temperature, Matryoshka and all objectives; each element sent once.

    Three workers have unequal shares of the batch.
    """
    expected, metrics = whole_gradients(name)
    result = run_workers(world_size, _share, name, micro_batches)
    assert int(result.pop("sent")) == sum(gradient.numel() for gradient in expected.values()) + MAX_FLAGS
    for key, value in metrics.items():
        torch.testing.assert_close(result.pop(f"metric {key}"), value.double(), atol=1e-6, rtol=0)  # ranks are float32
    assert_equal(result, expected)


def test_a_fixed_temperature_is_as_it_is_set_and_a_learned_one_is_bounded() -> None:
    for learned, scale in ((False, 1000.0), (True, 100.0)):
        contrastive = {"temperature": 0.001, "learn_temperature": learned}
        objective = Objective.model_validate({"contrastive": contrastive})
        learner = Learner(EmbeddingModel(Encoder(EncoderShape(**PARTS))), objective)
        with torch.no_grad():
            assert float(learner.scale) == pytest.approx(scale)


def test_records_without_negatives_make_no_room_for_them() -> None:
    model = EmbeddingModel(Encoder(EncoderShape(**PARTS)))
    learner = Learner(model, Objective.model_validate(OBJECTIVES["contrastive"]), negatives=False)
    fields = batch().fields
    part = learner.prepare(Batch(batch().ids, fields, pack([]), [0] * ROWS), seed=1)
    assert part.filled.shape == (ROWS, 0)
    assert part.keys.shape == (ROWS, 3)
    loss, _ = learner.compare(learner.rows([part], [learner.embed(part)]))
    assert bool(torch.isfinite(loss))
