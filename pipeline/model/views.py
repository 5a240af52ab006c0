"""Two views of each text, to contrast when there are no pairs: random crops, or the whole text twice under dropout.

    views = Views("crops", Frame(before=(2,), after=(3,), max_length=128), seed=0)        # [CLS] is 2, [SEP] 3
    batch = views.of(batch, sources, epoch=4)
    batch.text               # 2 10 11 12 13 14 15 16 17 18 19 20 21 3
    batch.views              # 2 11 12 13 14 15 3, and 2 14 15 16 17 18 3

Crops are independent, as in Contriever (Izacard et al. 2022, section 3.1): each is a contiguous span of 5% to 50% of
the text, at a random place, so the two may overlap or not. They depend only on the record, its tokens, the seed and the
epoch, so any number of workers and a resumed run train on the same ones. A text of fewer than MIN_TOKENS tokens is too
short to crop: both its views are the whole text. With `dropout` (SimCSE, Gao et al. 2021, section 3) all views are
whole texts, which differ only in the model's dropout.

A view has the same special tokens at its ends as a text. Prompts are put before views as they are before texts: the
query's before the first view, the document's before the second. Cost: a few passes over the batch's tokens.
"""

# Shapes: n rows, T tokens.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from pipeline.model.batch import EMPTY, Batch, text_hash
from pipeline.model.corruption import CROP, uniform
from pipeline.model.packing import Packed

SMALLEST, LARGEST = 0.05, 0.5  # a crop's share of the text (Contriever, appendix A.1)
MIN_CROP_TOKENS = 5  # because 5% of a short text says nothing. Ours
MIN_TOKENS = 2 * MIN_CROP_TOKENS

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Frame:
    """Special tokens before and after each text, and the most tokens of a text with them."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    max_length: int

    @property
    def room(self) -> int:
        """The most tokens of a text without them."""
        return self.max_length - len(self.before) - len(self.after)


@dataclass(frozen=True)
class Prompts:
    """The tokens of a source's prompts. The texts of a batch begin with the document's."""

    query: tuple[int, ...] = ()
    document: tuple[int, ...] = ()


@dataclass(frozen=True)
class Views:
    """Makes the views of batches."""

    kind: Literal["crops", "dropout"]
    frame: Frame
    seed: int
    prompts: dict[str, Prompts] = field(default_factory=dict)
    """By source; sources without prompts are left out."""

    def of(self, batch: Batch, sources: Sequence[str], epoch: int) -> Batch:
        """The batch with its views in this epoch instead of hard negatives. `sources`: (n,) of the rows."""
        ids, bounds = batch.text.ids.numpy(), batch.text.offsets.numpy()
        begin = bounds[:-1] + len(self.frame.before)
        length = bounds[1:] - len(self.frame.after) - begin
        prompts = [self.prompts.get(source, _NO_PROMPTS) for source in sources]
        skipped = _prompt_lengths(ids, begin, length, [each.document for each in prompts])
        begin, length = begin + skipped, length - skipped
        cuts = [(np.zeros_like(length), length)] * 2
        if self.kind == "crops":
            rows = zip(batch.ids, pairwise(bounds.tolist()), strict=True)
            keys = [text_hash(one.encode() + ids[a:b].tobytes()) for one, (a, b) in rows]
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            cuts = crops(length, np.array(keys, dtype=np.uint64), seed)
        put_before = [each.query for each in prompts], [each.document for each in prompts]
        first, second = (
            _framed(ids, begin + start, size, before, self.frame)
            for (start, size), before in zip(cuts, put_before, strict=True)
        )
        return replace(batch, views=(first, second), negatives=EMPTY, negative_counts=[0] * len(batch))


_NO_PROMPTS = Prompts()


def has_dropout(model: nn.Module) -> bool:
    """Whether two passes in training give different states."""
    return any(
        (each.p if isinstance(each, nn.Dropout) else getattr(each, "attention_dropout", 0.0)) > 0
        for each in model.modules()
    )


def crops(lengths: Ints, keys: Ints, seed: int) -> list[tuple[Ints, Ints]]:
    """Two crops of each text: (n,) first tokens and (n,) lengths, given the texts' (n,) lengths and 64-bit keys."""
    row, draw = np.repeat(np.arange(len(lengths)), 4), np.tile(np.arange(4), len(lengths))
    chances = uniform(keys, seed, CROP, row, draw).reshape(-1, 4)
    found = []
    for share, place in (chances[:, :2].T, chances[:, 2:].T):
        size = (lengths * (SMALLEST + (LARGEST - SMALLEST) * share)).astype(np.int64)
        size = np.where(lengths < MIN_TOKENS, lengths, np.maximum(size, MIN_CROP_TOKENS))
        found.append(((place * (lengths - size + 1)).astype(np.int64), size))
    return found


def _prompt_lengths(ids: Ints, begin: Ints, length: Ints, prompts: Sequence[tuple[int, ...]]) -> Ints:
    """(n,) tokens of each row's prompt that the row begins with: none in a text's later windows.

    The last tokens of a prompt may differ in a text, where a tokenizer joins them with what follows.
    """
    skipped = np.zeros_like(length)
    alike = np.ones(len(length), dtype=bool)
    for place in range(max(map(len, prompts), default=0)):
        expected = np.array([prompt[place] if place < len(prompt) else -1 for prompt in prompts])
        alike &= place < length
        alike[alike] = ids[begin[alike] + place] == expected[alike]
        skipped += alike
    return skipped


def _framed(ids: Ints, begin: Ints, length: Ints, prompts: Sequence[tuple[int, ...]], frame: Frame) -> Packed:
    """The spans of `ids`, each with its prompt before it, between special tokens, cut to the frame's length."""
    pool, places = [ids, np.array(frame.before, np.int64), np.array(frame.after, np.int64)], dict[Any, int]()
    end = len(ids) + len(frame.before) + len(frame.after)
    for prompt in prompts:
        if prompt not in places:
            places[prompt] = end
            pool.append(np.array(prompt, np.int64))
            end += len(prompt)
    prompt_length = np.minimum([len(prompt) for prompt in prompts], frame.room)
    length = np.minimum(length, frame.room - prompt_length)
    everywhere = np.ones_like(length)
    begins = [len(ids) * everywhere, np.array([places[prompt] for prompt in prompts]), begin]
    begins.append((len(ids) + len(frame.before)) * everywhere)
    sizes = [len(frame.before) * everywhere, prompt_length, length, len(frame.after) * everywhere]
    size = np.stack(sizes, axis=1).ravel()
    index = np.repeat(np.stack(begins, axis=1).ravel() - size.cumsum() + size, size) + np.arange(size.sum())
    return Packed.of(np.concatenate(pool)[index], np.concatenate([[0], size.reshape(-1, 4).sum(axis=1).cumsum()]))
