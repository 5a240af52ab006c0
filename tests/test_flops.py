"""Operations of a step against torch's own count of them; peaks by name; memory."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Objective
from pipeline.model.batch import Batch, Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.packing import Layout, Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.training.meter import device_utilisation, forward_backward_flops, gpu_peak, memory, peak_flops, step_flops

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

    def test_layers_that_do_not_run_and_no_texts_cost_nothing(self) -> None:
        encoder = Encoder(EncoderShape(**SHAPE))
        assert forward_backward_flops(encoder, []) == 0
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

        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
        special = {f"{name}_token_id": i for name, i in (("pad", 0), ("bos", 1), ("eos", 2), ("cls", 1), ("sep", 2))}
        encoder = PretrainedEncoder.from_description({"model_type": family, **sizes, **heads, **special})
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.02)
        expected = counted(lambda: encode(encoder, texts(LENGTHS)))
        assert forward_backward_flops(encoder, LENGTHS) == pytest.approx(expected, rel=0.01)

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


PEAKS = """
NVIDIA A100-SXM4-80GB                bfloat16  312
NVIDIA A100 80GB PCIe                float16   312
NVIDIA H100 80GB HBM3                bfloat16  989.5
NVIDIA H100 PCIe                     bfloat16  756.5
NVIDIA H100 NVL                      bfloat16  835.5
NVIDIA H200                          bfloat16  989.5
NVIDIA GH200 480GB                   bfloat16  989.5
NVIDIA L4                            bfloat16  121
NVIDIA L40S                          bfloat16  362
NVIDIA A10G                          bfloat16  70
Tesla T4                             float16   65
Tesla T4                             float32   8.1
Tesla T4                             bfloat16  none
Tesla V100-SXM2-16GB                 float16   125
Tesla V100-PCIE-16GB                 float16   112
NVIDIA GeForce RTX 4090              bfloat16  165.2
NVIDIA GeForce RTX 4090 Laptop GPU   bfloat16  none
NVIDIA GeForce RTX 3090 Ti           bfloat16  none
NVIDIA RTX A4000                     bfloat16  none
NVIDIA H100 80GB HBM3 MIG 1g.10gb    bfloat16  none
AMD Instinct MI300X                  bfloat16  none
"""  # device, type of the numbers and teraflops


class TestPeaks:
    def test_a_gpu_goes_by_its_name(self) -> None:
        for line in PEAKS.strip().splitlines():
            name, dtype, teraflops = re.split(r"  +", line)
            expected = None if teraflops == "none" else pytest.approx(float(teraflops) * 1e12)
            assert gpu_peak(name, getattr(torch, dtype)) == expected, line

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

    def test_a_cpu_is_measured_once_and_other_devices_have_none(self) -> None:
        peak = peak_flops(CPU)
        assert peak
        assert peak > 1e9
        assert peak_flops(CPU, torch.float32) == peak
        assert peak_flops(torch.device("meta")) is None
        assert device_utilisation(CPU) is None


def test_memory_is_this_process() -> None:
    found = memory(CPU)
    assert 0 < found["memory_bytes"] <= found["memory_peak_bytes"]
    assert found["memory_peak_bytes"] >= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "memory_share" not in found
