"""Makes the token table that `model.static_from` starts from: a teacher's vectors of the tokens.

    manifest = with_initial_table(config, folder, manifest, session.progress)      # manifest.initial_table

The recipe is model2vec's: encode each token of the data's tokenizer as a text, reduce the vectors to `d_model` numbers
by PCA, and multiply each by its token's SIF weight a / (a + p), where p is the token's share of the training split
(Arora et al. 2017, section 3). The mean of a text's rows is then a vector of the text, before any training.

The table is an artifact. Cost: encoding as many short texts as the tokenizer has tokens, and reading the token shards.
"""

# Shapes: V tokens, D width of the table, E the teacher's width.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import Artifact, Output, checked, open_parquet
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.core.tokenizer_files import parse_tokenizer
from pipeline.data.manifest import Manifest, sha256
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.teacher import model_recipe, opened, pool_options

FORMAT = 1  # of the table; raising it makes earlier ones stale
KEY = "model.static_from"
TABLE = "table.npy"
SIF_A = 1e-3  # Arora et al. 2017, section 3.1
ROW_RMS = 0.02  # of the average row: that of a random table. Five times as much trains worse (benchmarks/README.md)
MAX_RMS = 0.9  # below 1, which a normalised row only reaches at infinity
TOKENS_A_TASK = 4096
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a token that is part of a character

Array = npt.NDArray[np.float64]


def with_initial_table(
    config: Config, prepared: StoragePath, manifest: Manifest, progress: Callable[[], Progress]
) -> Manifest:
    """The manifest with the token table to start from, which is made first if it does not exist.

    Without `model.static_from`, returns the manifest. Raises ConfigError.
    """
    if config.model.static_from is None:
        return manifest
    teacher, width = model_recipe(config, KEY, config.model.static_from), config.model.dimensions()["d_model"]
    if width > teacher.width:
        raise ConfigError(
            f"model.d_model: found {width}; allowed are at most {teacher.width}, the size of the vectors of "
            f"{KEY}={config.model.static_from}"
        )
    file = prepared / "tokenizer.json"
    key = [FORMAT, teacher.fingerprint, sha256(file), manifest.fingerprint, width, config.model.epsilon]
    artifact = Artifact(config.root / "stages", "table", key)
    making = _Making(artifact, prepared, manifest, teacher, width, config.model.epsilon)
    artifact.make(lambda: making.fill(progress()))
    return replace(manifest, initial_table=str(artifact.folder / TABLE))


@dataclass(frozen=True)
class _Making:
    artifact: Artifact
    prepared: StoragePath
    manifest: Manifest
    teacher: EncoderRecipe
    width: int
    eps: float

    def fill(self, progress: Progress) -> dict[str, Any]:
        tokenizer = self._tokenizer()
        texts, size = token_texts(tokenizer), tokenizer.get_vocab_size()
        shards = self.manifest.of_split("train")
        sizes = [shard.rows for shard in shards]
        counted = self.artifact.tasks(progress, "train: count tokens", sizes, self._count, unit="rows")
        starts = range(0, size, TOKENS_A_TASK)
        options = pool_options(self.teacher, size, len(starts))
        title = "train: teacher's vectors of the tokens"
        sizes = [min(TOKENS_A_TASK, size - start) for start in starts]
        self.artifact.tasks(progress, title, sizes, self._encode, options=options, unit="tokens")
        counts = sum((self._read(f"counts-{index:06d}") for index in range(len(counted))), np.zeros(size))
        vectors = np.concatenate([self._read(f"vectors-{index:06d}") for index in range(len(starts))])
        rows = static_rows(vectors, counts, np.array([bool(text) for text in texts]), self.width)
        buffer = BytesIO()
        np.save(buffer, before_norm(rows, self.eps).astype(np.float32))
        self.artifact.output.write(TABLE, buffer.getvalue())
        return {"tokens": size}

    def _tokenizer(self) -> Tokenizer:
        file = checked(self.prepared / "tokenizer.json")
        return parse_tokenizer(file.read_text(encoding="utf-8"), file)

    def _count(self, index: int, output: Output) -> None:
        path, counts = self.manifest.of_split("train")[index].path, np.zeros(self._tokenizer().get_vocab_size())
        for batch in open_parquet(self.prepared / path).iter_batches():
            for name in self.manifest.text_fields:
                tokens = pc.list_flatten(batch[name])
                tokens = pc.list_flatten(tokens) if name == "negatives" else tokens
                counts += np.bincount(tokens.to_numpy(), minlength=len(counts))
        _save(output, f"counts-{index:06d}", counts)

    def _encode(self, index: int, output: Output) -> None:
        texts = token_texts(self._tokenizer())[index * TOKENS_A_TASK :][:TOKENS_A_TASK]
        _save(output, f"vectors-{index:06d}", opened(self.teacher).encode(texts, on_share=output.advance))

    def _read(self, name: str) -> Array:
        with (self.artifact.scratch / f"{name}.npy").open("rb") as file:
            return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]


def _save(output: Output, name: str, values: npt.NDArray[Any]) -> None:
    with output.writing(f"scratch/{name}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, values)


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token; empty for special tokens and for parts of a character."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = tokenizer.decode_batch([[number] for number in range(tokenizer.get_vocab_size())], False)
    return [
        "" if number in special or BROKEN in text else text.strip().removeprefix("##")
        for number, text in enumerate(texts)
    ]


def static_rows(vectors_VE: Array, counts_V: Array, used_V: npt.NDArray[np.bool_], width: int) -> Array:
    """(V, width): the vectors' leading principal components, each times its token's SIF weight; zeros if not used.

    Row lengths average ROW_RMS times the root of the width. The sign of a component is that of its largest entry.
    """
    used = vectors_VE[used_V].astype(np.float64)
    centred = used - used.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)  # in ascending order
    axes = axes[:, ::-1][:, :width]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    shares = counts_V / max(counts_V.sum(), 1)
    rows = np.zeros((len(vectors_VE), width))
    rows[used_V] = centred @ axes * (SIF_A / (SIF_A + shares[used_V]))[:, None]
    rms = np.sqrt(np.square(rows[used_V]).mean(axis=1))
    return rows * min(ROW_RMS / max(rms.mean(), 1e-12), MAX_RMS / max(rms.max(), 1e-12))


def before_norm(rows: Array, eps: float) -> Array:
    """The rows that RMSNorm with this epsilon turns into `rows`, whose root mean squares must be below 1."""
    mean_squares = np.square(rows).mean(axis=1, keepdims=True)
    return rows * np.sqrt(eps / (1 - mean_squares))
