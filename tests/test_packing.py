"""Packed sequences and their layouts against lists of lists."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.model.packing import Layout, Packed, gather_rows, join, pack, scatter_rows

TEXTS = [[3, 4, 5, 6, 7], [8], [9, 10], [], [11, 12, 13, 14, 15, 16, 17, 18], [19, 20]]


def rows_of(texts: list[list[int]]) -> list[list[int]]:
    """The packed row of each token, text by text."""
    row = iter(range(sum(map(len, texts))))
    return [[next(row) for _ in text] for text in texts]


def test_pack_slice_join() -> None:
    batch = pack(TEXTS)
    assert batch.ids.tolist() == [token for text in TEXTS for token in text]
    assert batch.lengths.tolist() == [len(text) for text in TEXTS]
    assert len(batch) == len(TEXTS)
    middle = batch.slice(1, 3)
    assert (middle.ids.tolist(), middle.offsets.tolist()) == ([8, 9, 10], [0, 1, 3])
    both = join(middle, pack([[], [1]]))
    assert (both.ids.tolist(), both.offsets.tolist()) == ([8, 9, 10, 1], [0, 1, 3, 3, 4])
    assert isinstance(batch.to("cpu"), Packed)


def test_a_layout_says_where_tokens_sit() -> None:
    layout = Layout.of(pack(TEXTS))
    assert layout.num_tokens == 18
    assert layout.longest == 8
    assert layout.sequence.tolist() == [i for i, text in enumerate(TEXTS) for _ in text]
    assert layout.position.tolist() == [i for text in TEXTS for i, _ in enumerate(text)]
    assert layout.mask.tolist() == [[i < len(text) for i in range(8)] for text in TEXTS]


def test_padding_and_back() -> None:
    batch = pack(TEXTS)
    layout = Layout.of(batch)
    padded = layout.pad(batch.ids)
    assert padded.tolist() == [text + [0] * (8 - len(text)) for text in TEXTS]
    assert layout.unpad(padded).tolist() == batch.ids.tolist()
    assert layout.pad(torch.ones(18, 2, 3)).shape == (6, 8, 2, 3)


@pytest.mark.parametrize("texts", [[], [[]], [[], []]])
def test_batches_without_tokens(texts: list[list[int]]) -> None:
    batch = pack(texts)
    layout = Layout.of(batch)
    assert (len(batch), layout.num_tokens, layout.longest) == (len(texts), 0, 0)
    assert layout.position.tolist() == layout.sequence.tolist() == []
    assert layout.pad(batch.ids).shape == (len(texts), 0)
    assert layout.unpad(layout.pad(batch.ids)).shape == (0,)
    assert layout.by_length is None
    assert sum(n for n, _, _ in layout.groups(layout).shapes) == len(texts)


def test_by_length_puts_shorter_sequences_first_and_keeps_ties_in_order() -> None:
    batch = pack(TEXTS)
    found = Layout.of(batch).by_length
    assert found is not None
    rows, layout = found
    order = sorted(range(len(TEXTS)), key=lambda i: len(TEXTS[i]))
    assert batch.ids[rows].tolist() == [token for i in order for token in TEXTS[i]]
    assert layout.lengths.tolist() == [len(TEXTS[i]) for i in order]
    assert layout.num_tokens == 18
    assert layout.by_length is None


def test_groups_are_of_one_length_of_queries_and_of_keys() -> None:
    chance = random.Random(0)
    queries, keys = ([[0] * chance.randrange(4) for _ in range(30)] for _ in range(2))
    groups = Layout.of(pack(queries)).groups(Layout.of(pack(keys)))
    order = sorted(range(30), key=lambda i: (len(queries[i]), len(keys[i])))
    each = [shape[1:] for shape in groups.shapes for _ in range(shape[0])]
    assert each == [(len(queries[i]), len(keys[i])) for i in order]
    assert len(groups.shapes) == len(set(each))
    for rows, texts in ((groups.query_rows, queries), (groups.key_rows, keys)):
        assert rows is not None
        assert rows.tolist() == [row for i in order for row in rows_of(texts)[i]]


def test_groups_are_found_once_and_move_nothing_that_lies_right() -> None:
    layout, other = Layout.of(pack([[1], [2], [3, 4]])), Layout.of(pack([[1], [2], [3, 4]]))
    groups = layout.groups(layout)
    assert groups.shapes == [(2, 1, 1), (1, 2, 2)]
    assert groups.query_rows is groups.key_rows is None
    assert layout.groups(layout) is groups
    assert layout.groups(other) is not groups


def test_a_token_table_asks_for_no_groups_or_masks() -> None:
    from pipeline.model.embedding_model import EmbeddingModel
    from pipeline.model.transformer import Encoder, EncoderShape

    table = Encoder(EncoderShape(vocab_size=30, d_model=8, num_layers=0, num_heads=2, d_ff=8))
    batch = pack(TEXTS)
    layout = Layout.of(batch)
    model = EmbeddingModel(table)
    model.pooled(model.hidden(batch, layout), layout)
    assert {"mask", "cells", "position", "by_length", "host_lengths"}.isdisjoint(vars(layout))


def test_take_and_put_have_the_gradients_of_indexing() -> None:
    rows = torch.tensor([4, 0, 2])
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(gather_rows(x, rows), x[rows])
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    torch.testing.assert_close(scatter_rows(y, rows, 5), zeros.index_put((rows,), y))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda y: scatter_rows(y, rows, 5), y.requires_grad_())
