"""Whether training computes on a device what it should: each way to a result beside another one, or float64 on the CPU.

    rig = Rig(torch.device("cuda"), shape_of("small"), pairs=32)
    for deviation in CHECKS["micro-batches"](rig):
        print(deviation)                       # micro-batches: loss 1e-07, at most 0.0001

Of gradients, a deviation is the largest over parameters of |found - expected| / |expected|, in the 2-norm; of a loss it
is relative, of unit vectors and attention the largest of a number. Bounds are ours: three times and more what was seen
on a CPU, and far below what a text that sees another, a lost micro-batch or other dropout does (0.1 to 1).
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_training import Trainer, encoder_of, learner_of, pairs
from pipeline.model.attention import AttentionOptions, attend
from pipeline.model.batch import Batch, MicroBatch
from pipeline.model.learner import Learner
from pipeline.model.packing import Layout, Packed, join
from pipeline.model.transformer import Encoder, EncoderShape, compile_layers
from pipeline.training import prefetch as prefetching
from pipeline.training.prefetch import Prefetch, to_batch, to_device
from pipeline.training.step import backward, micro_batch_ranges
from pipeline.training.strategy import DataParallel

FP32 = 1e-4
"""float32 against float64, or against itself with sums in another order: 24 bits, over some thousand additions."""
HALF = {torch.bfloat16: (2e-2, 1e-1), torch.float16: (5e-3, 2e-2)}
"""Loss and gradients of products in 16 bits, where a rounding is 2^-9 in bf16 and 2^-12 in fp16. On a CPU, six layers
of 384 were 0.003 and 0.02 away in bf16, 0.0006 and 0.002 in fp16."""
HALF_ATTENTION = 2e-2
LOSS_SCALE = 2.0**12  # fp16's, where a scaler has not found its own

DROPOUT = 0.1


@dataclass(frozen=True)
class Rig:
    """Where the checks run, and on what."""

    device: torch.device
    shape: EncoderShape
    pairs: int
    backend: str = "inductor"
    """torch.compile's; "eager" traces as "inductor" does, and compiles nothing."""
    steps: int = 30
    """Of training in fp16. Half of them are for the scale to settle, which begins at 2^16 and halves."""

    def learner(self, dropout: float = 0.0) -> Learner:
        return learner_of(self.shape, torch.device("cpu"), dropout).to(self.device)

    def batch(self, seed: int = 0) -> Batch:
        return to_batch(pairs("descriptions", self.pairs, self.shape.vocab_size, seed))

    def parts(self, learner: Learner, micro_batches: int = 1) -> list[MicroBatch]:
        batch = self.batch()
        return [self.part(learner, batch.slice(*ends)) for ends in micro_batch_ranges(batch, micro_batches)]

    def part(self, learner: Learner, batch: Batch) -> MicroBatch:
        return prefetching.to_device(learner.prepare(batch, seed=0), self.device)


@dataclass(frozen=True)
class Deviation:
    """How far a result is from what it should be."""

    what: str
    found: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        return not self.found <= self.allowed  # so is what is no number

    def __str__(self) -> str:
        return f"{self.what} {self.found:.2g}, at most {self.allowed:.2g}"


@dataclass(frozen=True)
class Result:
    loss: float
    gradients: list[Tensor]  # on the CPU, in float64

    def off(self, what: str, expected: Result, loss: float = FP32, gradients: float = FP32) -> Iterator[Deviation]:
        """How far this is from `expected`, and how far it may be."""
        yield Deviation(f"{what}: loss", abs(self.loss / expected.loss - 1), loss)
        worst = [float((a - b).norm() / b.norm()) for a, b in zip(self.gradients, expected.gradients, strict=True)]
        yield Deviation(f"{what}: gradients", float(torch.tensor(worst).max()), gradients)


def result_of(
    learner: Learner, parts: Sequence[MicroBatch], autocast: torch.dtype | None = None, loss_scale: float = 1.0
) -> Result:
    """Loss and gradients by training's own step."""
    strategy = DataParallel()
    strategy.attach(learner)
    torch.manual_seed(1)
    outcome = backward(learner, strategy, parts, autocast=autocast, loss_scale=loss_scale)
    return Result(float(outcome.metrics["loss"]), gradients_of(learner, loss_scale))


def gradients_of(learner: Learner, loss_scale: float = 1.0) -> list[Tensor]:
    return [p.grad.double().cpu() / loss_scale for p in learner.parameters() if p.grad is not None]


def float32(rig: Rig) -> Iterator[Deviation]:
    """Against the same step on the CPU, in float64."""
    learner = rig.learner()
    found = result_of(learner, rig.parts(learner))
    exact = learner_of(rig.shape, torch.device("cpu")).double()
    yield from found.off("float32 and float64 on the CPU", result_of(exact, [exact.prepare(rig.batch(), seed=0)]))


def half(rig: Rig) -> Iterator[Deviation]:
    """bf16 and fp16 against float32; a T4 has no bf16."""
    learner = rig.learner()
    expected = result_of(learner, rig.parts(learner))
    for dtype in half_types(rig.device):
        learner = rig.learner()
        scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        found = result_of(learner, rig.parts(learner), dtype, scale)
        yield from found.off(f"{_name(dtype)} and float32", expected, *HALF[dtype])


def half_types(device: torch.device) -> list[torch.dtype]:
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.bfloat16, torch.float16] if has_bf16 else [torch.float16]


def fp16_training(rig: Rig) -> Iterator[Deviation]:
    """Steps on one batch with a GradScaler, against as many updates in float32."""
    losses, skipped = _losses(rig, "fp16")
    expected, _ = _losses(rig, "fp32")
    yield Deviation("fp16 training: overflows after settling", sum(skipped[rig.steps // 2 :]), 0)
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=False))
    yield Deviation("fp16 training: losses and float32's", apart / expected[0] if losses else torch.nan, 1e-2)


def _losses(rig: Rig, precision: str) -> tuple[list[float], list[bool]]:
    """The loss before each update, and of each step whether it made none."""
    learner = rig.learner()
    trainer, parts = Trainer(learner, precision, rig.device), rig.parts(learner)
    losses, skipped = [], []
    for _ in range(rig.steps):
        outcome, updated = trainer.step(parts)
        skipped.append(not updated)
        if updated:
            losses.append(float(outcome.metrics["loss"]))
    return losses, skipped


def packing(rig: Rig) -> Iterator[Deviation]:
    """Packed texts against each alone, and against transformers' own EuroBERT, which pads them."""
    learner = rig.learner()
    model, texts = learner.model, rig.part(learner, rig.batch()).texts
    assert texts is not None
    with torch.no_grad():
        alone = torch.cat([model(texts.slice(i, i + 1)) for i in range(len(texts))])
        yield Deviation("packed and one at a time: vectors", _furthest(model(texts), alone), FP32)
        if importlib.util.find_spec("transformers"):
            layout = Layout.of(texts)
            apart = _furthest(model.hidden(texts, layout), _eurobert(encoder_of(learner), texts, layout))
            yield Deviation("packed and transformers' EuroBERT, padded: states", apart, 10 * FP32)


def _eurobert(encoder: Encoder, texts: Packed, layout: Layout) -> Tensor:
    """(T, D) states by transformers, of the same weights."""
    from transformers import EuroBertConfig, EuroBertModel

    shape = encoder.shape
    config = EuroBertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.kv_heads,
        hidden_act="gelu",
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=0,
    )
    oracle = EuroBertModel(config).eval().to(texts.ids.device)
    oracle.load_state_dict(encoder.state_dict())
    padded = oracle(input_ids=layout.pad(texts.ids), attention_mask=layout.mask.long())
    return layout.unpad(padded.last_hidden_state)


def attention(rig: Rig) -> Iterator[Deviation]:
    """A GPU's flash attention in 16 bits, and its padded way in float32, against float64 on the CPU."""
    heads, width = rig.shape.num_heads, rig.shape.head_width
    texts = join(*rig.batch().fields.values())
    cases: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "window": {"window": 5}}
    for (rule, options), key_heads in itertools.product(cases.items(), (heads, heads // 2)):
        chance = torch.Generator().manual_seed(0)
        states = [
            torch.randn(len(texts.ids), each, width, generator=chance, dtype=torch.float64)
            for each in (heads, key_heads, key_heads, heads)
        ]
        for dtype in (torch.float32, *half_types(rig.device)):
            rounded = [x.to(dtype) for x in states]
            exact = _attended([x.double() for x in rounded], texts, torch.device("cpu"), options)
            found = _attended(rounded, texts, rig.device, options)
            apart = max(_furthest(a, b) / float(b.abs().max()) for a, b in zip(found, exact, strict=True))
            what = f"attention, {rule}, {heads} heads over {key_heads}, {_name(dtype)}"
            yield Deviation(what, apart, FP32 if dtype == torch.float32 else HALF_ATTENTION)


def _attended(states: list[Tensor], texts: Packed, device: torch.device, options: dict[str, Any]) -> list[Tensor]:
    """What attention gives for queries, keys and values, and their gradients for the gradient that comes last."""
    q, k, v, gradient = (x.to(device) for x in states)
    layout = Layout.of(texts.to(device))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mixed = attend(q, k, v, layout, layout, AttentionOptions(**options))
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, gradient)]


def compiled(rig: Rig) -> Iterator[Deviation]:
    """Compiled layers against the same layers as they are, and in bf16 against float32."""
    learner = rig.learner()
    expected = result_of(learner, rig.parts(learner))
    for dtype in (None, *half_types(rig.device)[:1]):
        torch.compiler.reset()
        learner = rig.learner()
        compile_layers(encoder_of(learner), rig.backend)
        bounds = HALF[dtype] if dtype else (FP32, FP32)
        name = f"compiled, {_name(dtype)}, and float32" if dtype else "compiled and eager"
        yield from result_of(learner, rig.parts(learner), dtype).off(name, expected, *bounds)


def micro_batches(rig: Rig) -> Iterator[Deviation]:
    """Cached gradients against the whole batch's; with dropout, against one graph over the same micro-batches."""
    learner = rig.learner()
    whole = result_of(learner, rig.parts(learner))
    yield from result_of(rig.learner(), rig.parts(learner, 4)).off("micro-batches", whole)
    parts, one_graph = rig.parts(learner, 4), rig.learner(DROPOUT)
    torch.manual_seed(1)
    vectors = [one_graph.embed(part) for part in parts]
    loss, _ = one_graph.compare(one_graph.rows(parts, vectors))
    loss.backward()  # type: ignore[no-untyped-call]
    expected = Result(float(loss.detach()), gradients_of(one_graph))
    yield from result_of(rig.learner(DROPOUT), parts).off("micro-batches, with dropout", expected)


def checkpointing(rig: Rig) -> Iterator[Deviation]:
    """With dropout, which is to be replayed."""
    plain, again = rig.learner(DROPOUT), rig.learner(DROPOUT)
    encoder_of(again).gradient_checkpointing = True
    expected = result_of(plain, rig.parts(plain))
    yield from result_of(again, rig.parts(again)).off("gradient checkpointing", expected)


def prefetch(rig: Rig) -> Iterator[Deviation]:
    """Batches that a thread copies while the device computes, against plain copies."""
    learner, wrong = rig.learner(), 0
    tables = [pairs("descriptions", rig.pairs, rig.shape.vocab_size, seed) for seed in range(8)]
    feed = Prefetch(iter(tables), lambda rows: to_device(learner.prepare(to_batch(rows), 0), rig.device), rig.device)
    with closing(feed), torch.no_grad():
        for rows, part in zip(tables, feed, strict=True):
            vectors, plain = learner.embed(part), rig.part(learner, to_batch(rows))
            assert part.texts is not None
            assert plain.texts is not None
            wrong += not torch.equal(part.texts.ids, plain.texts.ids) or not torch.equal(part.keys, plain.keys)
            wrong += _furthest(vectors, learner.embed(plain)) > FP32
    yield Deviation("prefetch: batches that differ", wrong, 0)


def _furthest(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS: dict[str, Callable[[Rig], Iterator[Deviation]]] = {
    "float32": float32,
    "half": half,
    "fp16 training": fp16_training,
    "packing": packing,
    "attention": attention,
    "compiled": compiled,
    "micro-batches": micro_batches,
    "checkpointing": checkpointing,
    "prefetch": prefetch,
}
