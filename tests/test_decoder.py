"""The decoder against transformers' Llama, and against attention written out for one sequence at a time."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.model.decoder import Decoder, DecoderShape, Memory
from pipeline.model.packing import Layout, pack
from pipeline.model.transformer import Encoder, EncoderShape, parameter_count
from pipeline.model.unified import UnifiedTransformer, build_unified_transformer

SHAPE = DecoderShape(
    vocab_size=40, d_model=32, num_layers=2, num_heads=4, d_ff=48, num_kv_heads=2, memory_width=24, tie_head=False
)
TARGETS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
SOURCES = [2, 4, 0, 1]  # rows of memory for each of them
NEVER = 10**6  # an end that no sequence comes to


def random_decoder(shape: DecoderShape = SHAPE, tie_to: nn.Embedding | None = None) -> Decoder:
    """A decoder with weights large enough for each to matter."""
    torch.manual_seed(0)
    decoder = Decoder(shape, tie_to)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def random_memory(rows: list[int] = SOURCES, width: int = 24) -> Memory:
    generator = torch.Generator().manual_seed(1)
    return Memory(torch.randn(sum(rows), width, generator=generator), Layout.of(pack([[0] * count for count in rows])))


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def plain_rotation(x_LHK: Tensor, theta: float) -> Tensor:
    """Each pair (x_i, x_(i + K/2)) as a complex number, turned by the position times theta^(-2i/K)."""
    length, _, width = x_LHK.shape
    turned = torch.complex(x_LHK[..., : width // 2], x_LHK[..., width // 2 :])
    angle = torch.arange(length)[:, None] * theta ** (-2 * torch.arange(width // 2) / width)
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


def plain_attention(q_LHK: Tensor, k_MJK: Tensor, v_MJK: Tensor, causal: bool) -> Tensor:
    heads = []
    for head in range(q_LHK.shape[1]):
        shared = head * k_MJK.shape[1] // q_LHK.shape[1]
        scores = q_LHK[:, head] @ k_MJK[:, shared].T / math.sqrt(q_LHK.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v_MJK[:, shared])
    return torch.cat(heads, dim=-1)


def plain_hidden(decoder: Decoder, tokens: list[int], memory_MW: Tensor | None) -> Tensor:
    """One sequence, by the formulas."""
    weights, shape, width = decoder.state_dict(), decoder.shape, decoder.shape.head_width
    x = weights["embed_tokens.weight"][tokens]
    if shape.positions == "learned":
        x = x + weights["embed_positions.weight"][: len(tokens)]

    def norm(x: Tensor, name: str) -> Tensor:
        return plain_norm(x, weights[f"{name}.weight"], shape.norm_eps)

    def project(x: Tensor, name: str) -> Tensor:
        return (x @ weights[f"{name}.weight"].T).view(len(x), -1, width)

    def turn(x: Tensor) -> Tensor:
        return plain_rotation(x, shape.rope_theta) if shape.positions == "rotary" else x

    for i in range(shape.num_layers):
        layer = f"layers.{i}"
        seen = norm(x, f"{layer}.input_layernorm")
        q, k, v = (project(seen, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        x = x + plain_attention(turn(q), turn(k), v, causal=True) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        if memory_MW is not None and len(memory_MW):
            q = project(norm(x, f"{layer}.cross_attention_layernorm"), f"{layer}.cross_attn.q_proj")
            k, v = (project(norm(memory_MW, "memory_norm"), f"{layer}.cross_attn.{name}_proj") for name in "kv")
            x = x + plain_attention(q, k, v, causal=False) @ weights[f"{layer}.cross_attn.o_proj.weight"].T
        seen = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (seen @ weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (nn.functional.gelu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "norm")


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_without_a_memory_it_is_llama(num_kv_heads: int | None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = random_decoder(replace(SHAPE, memory_width=None, num_kv_heads=num_kv_heads))
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.d_model,
            intermediate_size=SHAPE.d_ff,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_heads,
            num_key_value_heads=num_kv_heads or SHAPE.num_heads,
            hidden_act="gelu",
            rms_norm_eps=SHAPE.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=39,
        )
    ).eval()
    weights = {f"{'' if name == 'lm_head.weight' else 'model.'}{name}": w for name, w in decoder.state_dict().items()}
    oracle.load_state_dict(weights)
    batch = pack(TARGETS)
    layout = Layout.of(batch)
    with torch.no_grad():
        ours = decoder.logits(decoder.hidden(batch, None))
        theirs = oracle(input_ids=layout.pad(batch.ids), attention_mask=layout.mask.long()).logits
        written = oracle.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=20)[0, 1:].tolist()
    torch.testing.assert_close(ours, layout.unpad(theirs), atol=1e-4, rtol=1e-4)
    assert decoder.generate(None, start_id=1, end_id=39, max_new_tokens=20) == [[t for t in written if t != 39]]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_with_a_memory_it_is_the_formula(positions: str) -> None:
    decoder = random_decoder(replace(SHAPE, positions=positions, max_positions=8))
    memory = random_memory()
    states = decoder.hidden(pack(TARGETS), memory)
    rows = memory.states.split(SOURCES)
    expected = torch.cat([plain_hidden(decoder, target, own) for target, own in zip(TARGETS, rows, strict=True)])
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.logits(states), states @ decoder.state_dict()["lm_head.weight"].T)


def test_a_decoder_with_cross_attention_may_do_without_a_memory() -> None:
    decoder = random_decoder()
    expected = torch.cat([plain_hidden(decoder, target, None) for target in TARGETS])
    torch.testing.assert_close(decoder.hidden(pack(TARGETS), None), expected, atol=1e-4, rtol=1e-4)


def test_packed_equals_one_at_a_time_with_gradients() -> None:
    decoder, memory = random_decoder(), random_memory()
    memory.states.requires_grad_()
    weights = torch.randn(sum(len(target) for target in TARGETS), SHAPE.d_model).split([len(t) for t in TARGETS])
    (decoder.hidden(pack(TARGETS), memory) * torch.cat(weights)).sum().backward()
    together = [p.grad.clone() for p in (*decoder.parameters(), memory.states) if p.grad is not None]
    decoder.zero_grad()
    memory.states.grad = None
    for i, (target, weight) in enumerate(zip(TARGETS, weights, strict=True)):
        own = memory.select(torch.arange(len(TARGETS)) == i)
        (decoder.hidden(pack([target]), own) * weight).sum().backward()
    alone = [p.grad for p in (*decoder.parameters(), memory.states) if p.grad is not None]
    assert len(together) == len(alone) == len(list(decoder.parameters()))  # the head has none, the memory has one
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_only_the_direction_of_the_memorys_rows_matters() -> None:
    """So that a sentence embedding of unit length is seen as well as an encoder's states."""
    decoder, memory = random_decoder(), random_memory()
    longer = Memory(memory.states * 100, memory.layout)
    torch.testing.assert_close(
        decoder.hidden(pack(TARGETS), longer), decoder.hidden(pack(TARGETS), memory), atol=1e-3, rtol=1e-3
    )


def test_vectors_as_memory_are_a_row_a_sequence() -> None:
    vectors = torch.randn(4, 24)
    memory = Memory.of_vectors(vectors)
    assert memory.layout.lengths.tolist() == [1, 1, 1, 1]
    decoder = random_decoder()
    expected = torch.cat([plain_hidden(decoder, t, v[None]) for t, v in zip(TARGETS, vectors, strict=True)])
    torch.testing.assert_close(decoder.hidden(pack(TARGETS), memory), expected, atol=1e-4, rtol=1e-4)


def without_cache(decoder: Decoder, memory: Memory, start: int, steps: int) -> list[list[int]]:
    """Greedy, with all of what is written so far read again for each token."""
    written = [[start] for _ in memory.layout.lengths]
    for _ in range(steps):
        states = decoder.hidden(pack(written), memory)
        last = torch.tensor([len(tokens) for tokens in written]).cumsum(0) - 1
        for tokens, token in zip(written, decoder.logits(states[last]).argmax(dim=-1).tolist(), strict=True):
            tokens.append(token)
    return [tokens[1:] for tokens in written]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_generation_with_a_cache_writes_what_it_does_without(positions: str) -> None:
    decoder = random_decoder(replace(SHAPE, positions=positions, max_positions=12))
    memory = random_memory()
    expected = without_cache(decoder, memory, start=1, steps=12)
    assert len({tuple(tokens) for tokens in expected}) == len(SOURCES)
    assert decoder.generate(memory, 1, NEVER, 12) == expected
    ends = [tokens[i] for i, tokens in enumerate(expected)]
    for end in ends:  # of which each stops at least one sequence, at different places
        until = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
        assert decoder.generate(memory, 1, end, 12) == until


def test_each_token_goes_through_the_layers_once() -> None:
    decoder, memory = random_decoder(), random_memory()
    rows = {"gate": 0, "key": 0, "memory": 0}

    def count(module: nn.Module, name: str) -> None:
        def add(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            rows[name] += len(inputs[0])

        module.register_forward_pre_hook(add)

    layer = decoder.layers[1]
    count(layer.mlp.gate_proj, "gate")
    count(layer.self_attn.k_proj, "key")
    count(layer.cross_attn.k_proj, "memory")
    decoder.generate(memory, 1, NEVER, 15)
    assert rows == {"gate": 15 * 4, "key": 15 * 4, "memory": sum(SOURCES)}

    expected = decoder.generate(memory, 1, NEVER, 15)
    end = expected[0][3]
    lengths = [tokens.index(end) + 1 if end in tokens else 15 for tokens in expected]
    assert len(set(lengths)) > 1
    rows.update(gate=0)
    decoder.generate(memory, 1, end, 15)
    assert rows["gate"] == sum(lengths)  # sequences that came to their end are read no more


def test_generation_of_nothing() -> None:
    decoder = random_decoder()
    assert decoder.generate(random_memory([]), 1, 2, 5) == []
    assert decoder.generate(random_memory(), 1, 2, 0) == [[], [], [], []]
    first = decoder.generate(random_memory([3]), 1, NEVER, 1)[0][0]
    assert decoder.generate(random_memory([3]), 1, first, 5) == [[]]


def test_what_does_not_fit_is_refused() -> None:
    decoder = random_decoder(replace(SHAPE, max_positions=5))
    with pytest.raises(ValueError, match="found 4 memory sequences for 1 targets"):
        decoder.hidden(pack([[1]]), random_memory())
    with pytest.raises(ValueError, match="6 tokens; the model's limit is max_positions=5"):
        decoder.hidden(pack([[1] * 6]), None)
    with pytest.raises(ValueError, match="max_new_tokens=6"):
        decoder.generate(random_memory(), 1, 2, 6)
    with pytest.raises(ValueError, match="takes no memory"):
        random_decoder(replace(SHAPE, memory_width=None)).hidden(pack(TARGETS), random_memory())
    with pytest.raises(ValueError, match=r"cannot share a table of shape \(40, 16\)"):
        Decoder(SHAPE, tie_to=nn.Embedding(40, 16))


def test_weights_begin_smaller_where_any_of_three_branches_ends() -> None:
    torch.manual_seed(0)
    decoder = Decoder(replace(SHAPE, d_model=128, d_ff=512, num_layers=4, memory_width=128, vocab_size=500))
    for name, parameter in decoder.named_parameters():
        if "norm" not in name:
            ends = {"o_proj", "down_proj"} & set(name.split("."))
            expected = 0.02 / math.sqrt(3 * 4) if ends else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_gradient_checkpointing_changes_no_gradient_with_dropout_on() -> None:
    decoder, memory = random_decoder(replace(SHAPE, dropout=0.3)).train(), random_memory()
    memory.states.requires_grad_()
    runs: list[None] = []
    decoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(None))

    def gradients() -> list[Tensor]:
        decoder.zero_grad()
        memory.states.grad = None
        torch.manual_seed(7)
        decoder.hidden(pack(TARGETS), memory).square().sum().backward()
        return [p.grad.clone() for p in (*decoder.parameters(), memory.states) if p.grad is not None]

    plain = gradients()
    decoder.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert len(runs) == 3


def shared() -> UnifiedTransformer:
    torch.manual_seed(0)
    return build_unified_transformer(40, 40, 8, 8, d_model=32, num_layers=1, num_heads=4, tie_embeddings=True)


def test_a_shared_table_is_one_parameter() -> None:
    model = shared()
    table = model.encoder.embed_tokens.weight
    assert model.decoder.output_table is table
    assert model.decoder.token_table is model.encoder.token_table
    assert not any("embed_tokens" in name or "lm_head" in name for name, _ in model.decoder.named_parameters())
    assert sum(parameter is table for parameter in model.parameters()) == 1
    model.decoder.logits(model.decoder.hidden(pack([[1, 2]]), None)).sum().backward()
    assert table.grad is not None


def test_a_shared_table_stays_shared() -> None:
    model = shared()
    for changed in (model.to(torch.float64), copy.deepcopy(model)):
        assert changed.decoder.output_table is changed.encoder.embed_tokens.weight
        assert changed.decoder.output_table.dtype == torch.float64
    weights = model.state_dict()
    assert len({tensor.data_ptr() for tensor in weights.values()}) == len(weights)  # which safetensors asks for
    with torch.device("meta"):
        loaded = shared()
    loaded.load_state_dict(weights, assign=True)
    assert loaded.decoder.output_table is loaded.encoder.embed_tokens.weight
    source, target = pack([[5, 6], [7]]), pack([[1, 2, 3], [4]])
    torch.testing.assert_close(loaded.eval()(source, target), model.eval()(source, target))


def test_an_own_table_and_head() -> None:
    assert random_decoder().output_table is not random_decoder().token_table.weight
    tied = random_decoder(replace(SHAPE, tie_head=True))
    assert tied.output_table is tied.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()


def test_the_unified_transformer() -> None:
    torch.manual_seed(0)
    model = build_unified_transformer(50, 40, 8, 6, d_model=32, num_layers=2, num_heads=4, decoder_layers=1).eval()
    source, target = pack([[5, 6, 49], [7], []]), pack([[1, 2], [1, 2, 3], [4]])
    layout = Layout.of(source)
    memory = Memory(model.encoder.hidden(source, layout), layout)
    expected = [
        plain_hidden(model.decoder, tokens, rows) @ model.decoder.state_dict()["lm_head.weight"].T
        for tokens, rows in zip([[1, 2], [1, 2, 3], [4]], memory.states.split([3, 1, 0]), strict=True)
    ]
    logits = model(source, target)
    assert logits.shape == (6, 40)
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert [len(tokens) for tokens in model.generate(source, 1, NEVER)] == [6, 6, 6]
    assert model.generate(source, 1, NEVER, 2) == [tokens[:2] for tokens in model.generate(source, 1, NEVER)]
    with pytest.raises(ValueError, match="max_positions=8"):
        model(pack([[5] * 9]), pack([[1]]))


def test_options_of_the_unified_transformer() -> None:
    build = build_unified_transformer
    common: dict[str, Any] = {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "d_ff": 64,
        "num_kv_heads": 2,
        "dropout": 0.2,
    }
    common |= {"positions": "learned", "norm_eps": 1e-6}
    model = build(40, 40, 9, 7, **common, gradient_checkpointing=True)
    assert model.encoder.shape == EncoderShape(vocab_size=40, max_positions=9, **common)
    assert model.decoder.shape == DecoderShape(
        vocab_size=40,
        max_positions=7,
        memory_width=32,
        tie_head=False,
        **common,
    )
    assert model.encoder.gradient_checkpointing
    assert model.decoder.gradient_checkpointing
    with pytest.raises(ValueError, match="tie_embeddings needs one vocabulary"):
        build(40, 41, 8, 8, tie_embeddings=True)


def test_the_default_is_the_base_model_of_vaswani() -> None:
    """65 million parameters there, with 37,000 tokens in one table (table 3); ours has a gate and a norm more."""
    with torch.device("meta"):
        model = build_unified_transformer(37_000, 37_000, 512, 512, tie_embeddings=True)
    assert parameter_count(model) / 1e6 == pytest.approx(65, rel=0.05)
    assert isinstance(model.encoder, Encoder)
