"""Compiled layers against the same layers as they are, for batches of changing sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.packing import Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape, compile_layers

# torch.compile keeps this warning of its own from being shown, which is too late where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SIZES = [(5, 1, 9, 3), (17, 2), (4, 4, 4, 11, 8, 30, 1), (2,)]  # lengths of each batch


def batches() -> Iterator[Packed]:
    torch.manual_seed(0)
    for lengths in SIZES:
        yield pack([torch.randint(5, 50, (length,)).tolist() for length in lengths])


def unified() -> nn.Module:
    torch.manual_seed(0)
    return Encoder(EncoderShape(vocab_size=50, d_model=16, num_layers=2, num_heads=2, d_ff=24))


def bert() -> nn.Module:
    from transformers import BertConfig

    from pipeline.model.pretrained import PretrainedEncoder

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=50, max_position_embeddings=40, **shape, **no_dropout)
    backbone = PretrainedEncoder.from_description(config.to_dict())
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


def outputs(model: EmbeddingModel, batch: Packed) -> list[Tensor]:
    """Vectors in training, their gradients, and vectors in evaluation."""
    model.zero_grad()
    vectors = model.train()(batch)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    with torch.no_grad():
        evaluated = model.eval()(batch)
    return [vectors, evaluated, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def check(model: EmbeddingModel, backend: str) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    compiled = deepcopy(model)
    compile_layers(compiled.backbone, backend)  # type: ignore[arg-type]
    graphs = []
    for batch in batches():
        for found, expected in zip(outputs(compiled, batch), outputs(model, batch), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(SIZES)  # a batch of another size compiles nothing
    assert compiled.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("make", [unified, bert])
def test_compiled_layers_give_the_same(make: Callable[[], nn.Module]) -> None:
    """Traced and differentiated ahead of time, as for the default backend, which then takes a minute to write C++."""
    check(EmbeddingModel(make()), "aot_eager")


@pytest.mark.exhaustive
@pytest.mark.parametrize("make", [unified, bert])
def test_layers_compiled_to_machine_code_give_the_same(make: Callable[[], nn.Module]) -> None:
    check(EmbeddingModel(make()), "inductor")


def test_checkpointed_layers_compile() -> None:
    encoder = unified()
    encoder.gradient_checkpointing = True
    check(EmbeddingModel(encoder), "aot_eager")
