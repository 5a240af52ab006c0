"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")                   # (1, D) float32, unit length

    recipe = EncoderRecipe(folder, config.embedding, graphs)             # what tasks on other nodes open it from
    open_encoder(recipe).encode_tokens(tokenize(recipe.tokenizer(), ["remove duplicate rows", "parse"]))

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens. A text longer
than the model reads is cut, or read in overlapping windows whose vectors are averaged. Token ids stay Arrow lists from
the tokenizer, or a file, to the backend. This module imports no torch, so tasks that only tokenize start fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.config import Embedding
from pipeline.core.files import fetched
from pipeline.core.path import StoragePath
from pipeline.index.backends import Backend, model_backend, open_backend
from pipeline.index.vectors import Column, as_groups, as_numbers, as_ragged, as_tokens, unit
from pipeline.model.folder import is_table, load_tokenizer, model_fingerprint, read_card

CHARS_PER_TOKEN = 8  # ours: English has about 5; a text with more is tokenized twice
WORD_END = re.compile(r"(?<=\w) ")
# Steps of tokenizers that look at a letter or digit and the space after it alone, or at most at what is on one side.
NORMALIZERS = (
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Strip",
    "StripAccents",
)
REPLACED = ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"})  # by Unigram models
WORD_SPLITS = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
SPLITS = ("Digits", "Punctuation")


@dataclass(frozen=True)
class EncoderRecipe:
    """What an encoder is made from, wherever it is to run."""

    folder: StoragePath
    settings: Embedding
    graphs: StoragePath
    """Where onnxruntime's graphs lie."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of nodes that encoding actors go to; by default all of them."""

    @property
    def local(self) -> Path:
        """The model's folder on this machine."""
        return fetched(self.folder)

    @cached_property
    def width(self) -> int:
        return self.settings.dimensions or read_card(self.local).width

    @cached_property
    def is_table(self) -> bool:
        """Whether the model is a token table, which numpy looks up."""
        return is_table(read_card(self.local)) and self.settings.backend == "torch"

    @property
    def overlap(self) -> int | None:
        return None if self.settings.long_texts == "cut" else self.settings.window_overlap

    def tokenizer(self) -> Tokenizer:
        """Kept in its process: tokenizers does not give back the memory of one that is dropped."""
        return _tokenizer(self.folder, self.overlap)

    @cached_property
    def space(self) -> str:
        """Names the vectors: what is equal in it has equal vectors for equal texts, and other names have others."""
        settings = self.settings
        parts = [model_fingerprint(self.local)[:12], str(self.width), settings.precision]
        parts += [f"{settings.long_texts}{settings.window_overlap}"] if self.overlap is not None else []
        return "-".join(parts)


@lru_cache(maxsize=4)
def _tokenizer(folder: StoragePath, overlap: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(fetched(folder))
    if overlap is not None:
        let_windows_overlap(tokenizer, overlap)
    return tokenizer


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one.

    `dimensions` cuts the vectors to one of the sizes that the model was trained for. `backend` runs the model; by
    default numpy or torch.
    """

    def __init__(
        self,
        place: StoragePath,
        batch_tokens: int | Literal["auto"] = "auto",
        device: str | None = None,
        dimensions: int | None = None,
        backend: Backend | None = None,
        window_overlap: int | None = None,
    ) -> None:
        folder = fetched(place)
        self.card, self.tokenizer = read_card(folder), load_tokenizer(folder)
        self.backend = backend or model_backend(folder, device=device)
        self.batch_tokens = self.backend.best_batch_tokens if batch_tokens == "auto" else batch_tokens
        self.width = dimensions or self.backend.width
        if window_overlap is not None:
            let_windows_overlap(self.tokenizer, window_overlap)

    def encode(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(N, width) float32 vectors; a text without tokens gives the zero vector.

        `prompt` names one of the model's own: `query` or `document`.
        """
        lead = self.card.head.prompt(prompt)
        return self.encode_tokens(tokenize(self.tokenizer, [lead + text for text in texts]))

    def encode_tokens(self, tokens: Column) -> np.ndarray:
        """(N, width) float32 vectors of texts that are tokenized: a column of list<int32>, without nulls.

        Of list<list<int32>>, a text's windows, the vector is their mean, each weighed by its tokens, at unit length.
        """
        if pa.types.is_list(tokens.type.value_type):
            windows, offsets = as_ragged(tokens)
            vectors = _mean_of_windows(self._vectors(windows), as_numbers(pc.list_value_length(windows)), offsets)
        else:
            vectors = self._vectors(tokens)
        return unit(vectors[:, : self.width]) if self.width < self.backend.width else vectors

    def _vectors(self, tokens: Column) -> np.ndarray:
        """(N, D), of texts or windows of list<int32>."""
        if self.batch_tokens is None:
            ids, offsets = as_ragged(tokens)
            return self.backend.vectors(as_numbers(ids), offsets)
        order = np.argsort(pc.list_value_length(tokens).to_numpy(), kind="stable")
        flat, offsets = as_ragged(tokens.take(pa.array(order)))
        ids = as_numbers(flat)
        vectors = np.empty((len(order), self.backend.width), np.float32)
        for start, stop in _batches(offsets, self.batch_tokens):
            batch = offsets[start : stop + 1]
            vectors[order[start:stop]] = self.backend.vectors(ids[batch[0] : batch[-1]], batch - batch[0])
        return vectors


def _mean_of_windows(vectors: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N, D), of (W, D) vectors of windows of (W,) tokens, where text i has the windows from offset i on."""
    counts, found = np.diff(offsets), np.zeros((len(offsets) - 1, vectors.shape[1]), np.float32)
    found[counts == 1] = vectors[offsets[:-1][counts == 1]]
    if (counts > 1).any():
        sums = np.add.reduceat(vectors * lengths[:, None], offsets[:-1][counts > 0])
        found[counts > 1] = unit(sums[counts[counts > 0] > 1])
    return found


def _batches(offsets: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """First text of a batch and of the next, `batch_tokens` tokens together (or a single longer text)."""
    edges = np.flatnonzero(np.diff(offsets[1:] // batch_tokens)) + 1
    return pairwise([0, *edges.tolist(), len(offsets) - 1]) if len(offsets) > 1 else iter(())


def open_encoder(recipe: EncoderRecipe, threads: int | None = None, device: str | None = None) -> TextEncoder:
    """The encoder of a recipe. `threads` of onnxruntime's; torch's are set for the process."""
    settings = recipe.settings
    return TextEncoder(
        recipe.local,
        settings.batch_tokens,
        device,
        settings.dimensions,
        open_backend(recipe.local, settings, recipe.graphs, threads, device),
        window_overlap=recipe.overlap,
    )


def let_windows_overlap(tokenizer: Tokenizer, overlap: int) -> None:
    """Set a tokenizer that cuts to also give what it cut off, in windows that share `overlap` tokens."""
    cut = tokenizer.truncation or {}
    tokenizer.enable_truncation(cut["max_length"], stride=overlap, direction=cut["direction"])


def tokenize(tokenizer: Tokenizer, texts: Sequence[str] | Column) -> pa.Array:
    """Token ids of each text, list<int32>; after `let_windows_overlap` of each of its windows, list<list<int32>>.

    A text that will be cut is cut before it is tokenized too, where that cannot change its tokens.
    """
    texts = texts.to_pylist() if isinstance(texts, pa.Array | pa.ChunkedArray) else list(texts)
    cut = tokenizer.truncation
    if cut and cut["stride"]:
        windows = [[text, *text.overflowing] for text in tokenizer.encode_batch(texts)]
        return as_groups(as_tokens([one.ids for each in windows for one in each]), [len(each) for each in windows])
    most = cut["max_length"] if cut and cut["direction"] == "right" and _words_are_apart(tokenizer) else 0
    begins = _begins(texts, most * CHARS_PER_TOKEN) if most else texts
    encodings = tokenizer.encode_batch_fast(begins)
    again = [i for i, one in enumerate(encodings) if len(one) < most and begins[i] is not texts[i]]
    for i, encoding in zip(again, tokenizer.encode_batch_fast([texts[i] for i in again]), strict=True):
        encodings[i] = encoding
    return as_tokens([encoding.ids for encoding in encodings])


def _begins(texts: list[str], chars: int) -> list[str]:
    """Texts up to the first end of a word after so many characters; those that have none are the same objects."""
    ends = [WORD_END.search(text, chars) if len(text) > chars else None for text in texts]
    return [text[: end.start()] if end else text for text, end in zip(texts, ends, strict=True)]


def _words_are_apart(tokenizer: Tokenizer) -> bool:
    """Whether what precedes a `WORD_END` has the same tokens without what follows: then enough of them are enough.

    That is so where no step that a text goes through looks from one side of such a space to the other, and one splits
    there, as models see one piece at a time. A step that is not known counts as one that looks.
    """
    normalizers, splits = (_steps(_described(part)) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer))
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return (
        all(step["type"] in NORMALIZERS or step.get("pattern") in REPLACED for step in normalizers)
        and all(step["type"] in (*SPLITS, *WORD_SPLITS) for step in splits)
        and any(step["type"] in WORD_SPLITS and step.get("use_regex", step.get("split", True)) for step in splits)
        and not any(" " in content.lstrip(" ") for content in added)
    )


def _described(part: Any) -> dict[str, Any]:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return json.loads(part.__getstate__()) if part else {"type": "Sequence"}  # type: ignore[no-any-return]


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part.get("normalizers") or part.get("pretokenizers") or [] for step in _steps(each)]
