"""Encodes texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")                   # (1, D) float32, unit length

    recipe = EncoderRecipe(folder, config.embedding, graphs)             # picklable: tasks on other nodes open it
    open_encoder(recipe).encode_tokens(tokenize(recipe.tokenizer(), ["remove duplicate rows", "parse"]))

Texts are tokenized together, sorted by length and encoded in batches of about `batch_tokens` tokens. Longer texts than
the model's maximum are truncated, or encoded in overlapping windows whose vectors are averaged. Token ids are Arrow
lists from the tokenizer, or a file, to the backend. Does not import torch, so tasks that only tokenize start fast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pipeline.core.files import local_copy
from pipeline.core.path import StoragePath
from pipeline.core.tokenizer_files import BYTE_LEVEL_SPLIT, bounded, described, encoding
from pipeline.index.backends import Backend, model_backend, open_backend
from pipeline.index.vectors import Column, as_groups, as_numbers, as_ragged, as_tokens, unit
from pipeline.model.folder import is_table, load_tokenizer, model_fingerprint, read_model_spec

CHARS_PER_TOKEN = 8  # ours: English has about 5; texts with more are tokenized twice
WORD_END = re.compile(r"(?<=\w) ")
# Normalizers that never look across a space that follows a letter or digit.
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
REPLACED = ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"})  # patterns of Replace in Unigram tokenizers
WORD_SPLITS = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
OnShare = Callable[[float], object]
SPLITS = ("Digits", "Punctuation")
BYTE_LEVEL = {"Regex": BYTE_LEVEL_SPLIT}  # splits at spaces as GPT-2's pattern does


@dataclass(frozen=True)
class EncoderRecipe:
    """Everything needed to open an encoder on any node."""

    folder: StoragePath
    settings: Embedding
    graphs: StoragePath
    """Folder of onnxruntime's graphs."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes for encoding actors; by default all nodes."""

    @property
    def local(self) -> Path:
        """The model's folder on this machine."""
        return local_copy(self.folder)

    @cached_property
    def width(self) -> int:
        return self.settings.dimensions or read_model_spec(self.local).width

    @cached_property
    def is_table(self) -> bool:
        """Whether the model is a token table that runs in numpy."""
        return is_table(read_model_spec(self.local)) and self.settings.backend == "torch"

    @property
    def overlap(self) -> int | None:
        return None if self.settings.long_texts == "cut" else self.settings.window_overlap

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, cached per process because dropped tokenizers leak memory."""
        return _tokenizer(self.folder, self.overlap)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vectors: two recipes with the same id give every text the same vector."""
        settings = self.settings
        parts = [model_fingerprint(self.local)[:12], str(self.width), settings.precision]
        parts += [f"{settings.long_texts}{settings.window_overlap}"] if self.overlap is not None else []
        return "-".join(parts)


@lru_cache(maxsize=4)
def _tokenizer(folder: StoragePath, overlap: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(local_copy(folder))
    if overlap is not None:
        enable_windows(tokenizer, overlap)
    return tokenizer


class TextEncoder:
    """A model with its tokenizer. `device` defaults to the GPU if there is one.

    `dimensions` truncates the vectors to one of the model's Matryoshka sizes. `backend` runs the model; by default
    numpy or torch.
    """

    def __init__(
        self,
        model: StoragePath,
        batch_tokens: int | Literal["auto"] = "auto",
        device: str | None = None,
        dimensions: int | None = None,
        backend: Backend | None = None,
        window_overlap: int | None = None,
    ) -> None:
        folder = local_copy(model)
        self.spec, self.tokenizer = read_model_spec(folder), load_tokenizer(folder)
        self.backend = backend or model_backend(folder, device=device)
        self.batch_tokens = self.backend.best_batch_tokens if batch_tokens == "auto" else batch_tokens
        self.width = dimensions or self.backend.width
        if window_overlap is not None:
            enable_windows(self.tokenizer, window_overlap)

    def encode(self, texts: Sequence[str], prompt: str = "", on_share: OnShare = lambda share: None) -> np.ndarray:
        """Encode texts to (N, width) float32; a text without tokens gives the zero vector.

        `prompt` names one of the model's prompts: `query` or `document`. `on_share` is called with the share of the
        tokens that is encoded, after each batch.
        """
        prefix = self.spec.head.prompt(prompt)
        return self.encode_tokens(tokenize(self.tokenizer, [prefix + text for text in texts]), on_share)

    def encode_tokens(self, tokens: Column, on_share: OnShare = lambda share: None) -> np.ndarray:
        """Encode tokenized texts, a column of list<int32> without nulls, to (N, width) float32.

        For list<list<int32>>, the windows of each text, a vector is the mean over windows, weighted by their tokens, at
        unit length.
        """
        if pa.types.is_list(tokens.type.value_type):
            windows, offsets = as_ragged(tokens)
            vectors = _mean_of_windows(
                self._vectors(windows, on_share), as_numbers(pc.list_value_length(windows)), offsets
            )
        else:
            vectors = self._vectors(tokens, on_share)
        return unit(vectors[:, : self.width]) if self.width < self.backend.width else vectors

    def _vectors(self, tokens: Column, on_share: OnShare) -> np.ndarray:
        """Encode texts or windows, list<int32>, to (N, D)."""
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
            on_share(float((batch[-1] - offsets[0]) / max(offsets[-1] - offsets[0], 1)))
        return vectors


def _mean_of_windows(vectors: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Average (W, D) vectors of windows with (W,) tokens to (N, D); the windows of text i begin at offsets[i]."""
    counts, means = np.diff(offsets), np.zeros((len(offsets) - 1, vectors.shape[1]), np.float32)
    means[counts == 1] = vectors[offsets[:-1][counts == 1]]
    if (counts > 1).any():
        sums = np.add.reduceat(vectors * lengths[:, None], offsets[:-1][counts > 0])
        means[counts > 1] = unit(sums[counts[counts > 0] > 1])
    return means


def _batches(offsets: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first text of each batch and of the next; a batch has `batch_tokens` tokens, or one longer text."""
    edges = np.flatnonzero(np.diff(offsets[1:] // batch_tokens)) + 1
    return pairwise([0, *edges.tolist(), len(offsets) - 1]) if len(offsets) > 1 else iter(())


def open_encoder(recipe: EncoderRecipe, threads: int | None = None, device: str | None = None) -> TextEncoder:
    """Open a recipe's encoder. `threads` is for onnxruntime; torch applies it to the whole process."""
    settings = recipe.settings
    return TextEncoder(
        recipe.local,
        settings.batch_tokens,
        device,
        settings.dimensions,
        open_backend(recipe.local, settings, recipe.graphs, threads, device),
        window_overlap=recipe.overlap,
    )


def enable_windows(tokenizer: Tokenizer, overlap: int) -> None:
    """Make a truncating tokenizer also return the rest of a text, in windows that share `overlap` tokens."""
    truncation = tokenizer.truncation or {}
    tokenizer.enable_truncation(truncation["max_length"], stride=overlap, direction=truncation["direction"])


def tokenize(tokenizer: Tokenizer, texts: Sequence[str] | Column) -> pa.Array:
    """Token ids of each text, list<int32>; after `enable_windows`, of each text's windows, list<list<int32>>.

    Long texts are shortened before tokenizing if that cannot change their tokens.
    """
    with encoding(tokenizer):
        return _tokenize(tokenizer, texts.to_pylist() if isinstance(texts, pa.Array | pa.ChunkedArray) else list(texts))


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> pa.Array:
    truncation, texts = tokenizer.truncation, bounded(tokenizer, texts)
    if truncation and truncation["stride"]:
        windows = [[encoded, *encoded.overflowing] for encoded in tokenizer.encode_batch(texts)]
        ids = [window.ids for each in windows for window in each]
        return as_groups(as_tokens(ids), [len(each) for each in windows])
    from_right = truncation and truncation["direction"] == "right"
    most = truncation["max_length"] if truncation and from_right and _splits_at_spaces(tokenizer) else 0
    shortened = _shortened(texts, most * CHARS_PER_TOKEN) if most else texts
    encodings = tokenizer.encode_batch_fast(shortened)
    again = [i for i, each in enumerate(encodings) if len(each) < most and shortened[i] is not texts[i]]
    for i, encoded in zip(again, tokenizer.encode_batch_fast([texts[i] for i in again]), strict=True):
        encodings[i] = encoded
    return as_tokens([encoded.ids for encoded in encodings])


def _shortened(texts: list[str], chars: int) -> list[str]:
    """Cut each text at the first word end after `chars` characters; other texts are returned as the same object."""
    ends = [WORD_END.search(text, chars) if len(text) > chars else None for text in texts]
    return [text[: end.start()] if end else text for text, end in zip(texts, ends, strict=True)]


def _splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokens before a `WORD_END` do not depend on the text after it.

    True if no step looks across such a space and one step splits there, as the model tokenizes each piece separately.
    Unknown steps count as looking across.
    """
    normalizers, splits = (_steps(described(part)) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer))
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return (
        all(step["type"] in NORMALIZERS or step.get("pattern") in REPLACED for step in normalizers)
        and all(step["type"] in (*SPLITS, *WORD_SPLITS) or step.get("pattern") == BYTE_LEVEL for step in splits)
        and any(_splits_words(step) for step in splits)
        and not any(" " in content.lstrip(" ") for content in added)
    )


def _splits_words(step: dict[str, Any]) -> bool:
    options = step.get("use_regex", step.get("split", True))
    return step.get("pattern") == BYTE_LEVEL or (step["type"] in WORD_SPLITS and options)


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part.get("normalizers") or part.get("pretokenizers") or [] for step in _steps(each)]
