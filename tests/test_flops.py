"""Operations of a step against torch's own count of them; peaks by name; memory."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Objective
from pipeline.model.card import Head
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.packing import Layout, Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.objectives.batch import Batch
from pipeline.objectives.learner import Learner, Special
from pipeline.training.flops import (
    device_utilisation,
    forward_backward_flops,
    gpu_peak,
    memory,
    peak_flops,
    step_flops,
)

LENGTHS = [3, 40, 17, 40, 90]
VOCABULARY, WIDTH = 50, 32
SHAPE = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": 3, "num_heads": 4, "d_ff": 96}
CPU = torch.device("cpu")


def texts(lengths: list[int], seed: int = 0) -> Packed:
    chance = torch.Generator().manual_seed(seed)
    return pack([torch.randint(5, VOCABULARY, (length,), generator=chance).tolist() for length in lengths])


def counted(run: Callable[[], Tensor]) -> float:
    """Operations that torch counts in a forward and backward pass of what `run` returns.

    It cannot look into the fused attention of a CPU, so attention takes the plain products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run().sum().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def encode(encoder: nn.Module, batch: Packed) -> Tensor:
    return encoder.hidden(batch, Layout.of(batch))  # type: ignore[operator, no-any-return]


class TestStacks:
    @pytest.mark.parametrize("kv_heads", [None, 2])
    def test_an_encoder(self, kv_heads: int | None) -> None:
        encoder, batch = Encoder(EncoderShape(**SHAPE, num_kv_heads=kv_heads)), texts(LENGTHS)
        expected = counted(lambda: encode(encoder, batch))
        assert forward_backward_flops(encoder, batch.lengths) == pytest.approx(expected, rel=0.01)

    def test_layers_that_do_not_run_cost_nothing(self) -> None:
        encoder = Encoder(EncoderShape(**SHAPE))
        encoder.active_layers = 0
        assert forward_backward_flops(encoder, LENGTHS) == 0
        encoder.active_layers = 1
        expected = counted(lambda: encode(encoder, texts(LENGTHS)))
        assert forward_backward_flops(encoder, LENGTHS) == pytest.approx(expected, rel=0.01)

    def test_recomputation_is_not_counted(self) -> None:
        encoder = Encoder(EncoderShape(**SHAPE)).train()
        plain = forward_backward_flops(encoder, LENGTHS)
        encoder.gradient_checkpointing = True
        assert forward_backward_flops(encoder, LENGTHS) == plain
        assert counted(lambda: encode(encoder, texts(LENGTHS))) > 1.2 * plain

    def test_a_decoder_without_memory(self) -> None:
        decoder, batch = Decoder(DecoderShape(**SHAPE)), texts(LENGTHS)
        expected = counted(lambda: decoder.hidden(batch, None))
        assert forward_backward_flops(decoder, batch.lengths) == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
    def test_pretrained_encoders(self, family: str) -> None:
        from pipeline.model.pretrained import PretrainedEncoder

        described = {
            "model_type": family,
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        }
        encoder = PretrainedEncoder.from_description(described)
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.02)
        expected = counted(lambda: encode(encoder, texts(LENGTHS)))
        assert forward_backward_flops(encoder, LENGTHS) == pytest.approx(expected, rel=0.01)

    def test_no_texts_cost_nothing(self) -> None:
        assert forward_backward_flops(Encoder(EncoderShape(**SHAPE)), []) == 0

    def test_squares_of_long_texts_do_not_overflow(self) -> None:
        encoder = Encoder(EncoderShape(**SHAPE))
        lengths = torch.full((3,), 2**31, dtype=torch.int64)
        assert forward_backward_flops(encoder, lengths) > 12 * 3 * WIDTH * 3 * 2.0**62


OBJECTIVES = {
    "contrastive": {"contrastive": {"hard_negatives": 1}},
    "seq2seq": {"seq2seq": {}},
    "deletion": {"denoising": {"corruption": "deletion"}},
    "spans": {"denoising": {"corruption": "spans"}},
    "mlm": {"mlm": {}},
    "hybrid": {"contrastive": {}, "seq2seq": {}, "mlm": {}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_each_objective(name: str) -> None:
    torch.manual_seed(0)
    objective = Objective.model_validate(OBJECTIVES[name])
    encoder = Encoder(EncoderShape(**SHAPE))
    decoder = Decoder(DecoderShape(**SHAPE, memory_width=WIDTH), encoder.token_table)
    special = Special(start=2, end=3, mask=4, kept=frozenset(range(5)), vocab_size=VOCABULARY)
    learner = Learner(EmbeddingModel(encoder, Head()), objective, special, decoder)
    fields = {"anchor": texts([5, 9, 30]), "positive": texts([50, 70, 33], seed=1)}
    batch = Batch(["a", "b", "c"], fields, texts([40, 60], seed=2), [1, 0, 1])
    part = learner.prepare(batch, seed=0)

    def run() -> Tensor:
        vectors, losses = learner(part)
        sums = [loss.sum for loss in losses.values()]
        return torch.stack([*sums, *([] if vectors is None else [vectors.sum()])])

    assert step_flops(learner, [part]) == pytest.approx(counted(run), rel=0.01)
    assert step_flops(learner, [part, part]) == 2 * step_flops(learner, [part])


class TestPeaks:
    @pytest.mark.parametrize(
        ("name", "dtype", "teraflops"),
        [
            ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
            ("NVIDIA A100 80GB PCIe", torch.float16, 312),
            ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
            ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
            ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
            ("NVIDIA H200", torch.bfloat16, 989.5),
            ("NVIDIA GH200 480GB", torch.bfloat16, 989.5),
            ("NVIDIA L4", torch.bfloat16, 121),
            ("NVIDIA L40S", torch.bfloat16, 362),
            ("NVIDIA A10G", torch.bfloat16, 70),
            ("Tesla T4", torch.float16, 65),
            ("Tesla T4", torch.float32, 8.1),
            ("Tesla T4", torch.bfloat16, None),
            ("Tesla V100-SXM2-16GB", torch.float16, 125),
            ("Tesla V100-PCIE-16GB", torch.float16, 112),
            ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
            ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
            ("NVIDIA RTX A4000", torch.bfloat16, None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
            ("AMD Instinct MI300X", torch.bfloat16, None),
        ],
    )
    def test_a_gpu_goes_by_its_name(self, name: str, dtype: torch.dtype, teraflops: float | None) -> None:
        assert gpu_peak(name, dtype) == (None if teraflops is None else pytest.approx(teraflops * 1e12))

    def test_float32_is_tf32_where_torch_may_use_it(self) -> None:
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert gpu_peak("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
            torch.set_float32_matmul_precision("high")
            assert gpu_peak("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
            assert gpu_peak("Tesla T4", torch.float32) == 8.1e12
        finally:
            torch.set_float32_matmul_precision(before)

    def test_a_cpu_is_measured_once(self) -> None:
        peak = peak_flops(CPU)
        assert peak
        assert peak > 1e9
        assert peak_flops(CPU, torch.float32) == peak

    def test_other_devices_have_none(self) -> None:
        assert peak_flops(torch.device("meta")) is None


def test_memory_is_this_process() -> None:
    found = memory(CPU)
    assert 0 < found["memory_bytes"] <= found["memory_peak_bytes"]
    assert found["memory_peak_bytes"] >= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "memory_share" not in found


def test_a_cpu_has_no_utilisation_of_its_own() -> None:
    assert device_utilisation(CPU) is None
