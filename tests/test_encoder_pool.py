"""How many encoders a cluster gets, what each of them takes, and what one gives."""

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Embedding
from pipeline.core.cluster import Cluster, Node
from pipeline.index.encoder import EncoderRecipe, TextEncoder, tokenize
from pipeline.index.pool import EncodeTexts, Pool
from pipeline.index.vectors import as_matrix
from tests.embedding_world import save_random_model

MANY = 10**9
LAPTOP = (Node(2, 0, {}),)
CPUS = (Node(0, 0, {}), *[Node(16, 0, {})] * 8)
GPUS = (Node(0, 0, {}), *[Node(8, 1, {})] * 4, *[Node(8, 1, None)] * 12)


@pytest.mark.parametrize(
    ("nodes", "texts", "wanted", "pool"),
    [
        (LAPTOP, MANY, None, Pool(most=2, now=2, cpus=0.5, gpus=0, threads=1)),
        (LAPTOP, 1024, None, Pool(most=1, now=1, cpus=1.0, gpus=0, threads=2)),
        (LAPTOP, 1025, None, Pool(most=2, now=2, cpus=0.5, gpus=0, threads=1)),
        (LAPTOP, 0, None, Pool(most=1, now=1, cpus=1.0, gpus=0, threads=2)),
        (CPUS, MANY, None, Pool(most=128, now=128, cpus=0.99, gpus=0, threads=1)),
        (CPUS, MANY, 4, Pool(most=4, now=4, cpus=1.0, gpus=0, threads=16)),
        (CPUS, 500, None, Pool(most=1, now=1, cpus=1.0, gpus=0, threads=16)),
        (GPUS, MANY, None, Pool(most=16, now=4, cpus=1.0, gpus=1, threads=8)),
        (GPUS, 5000, None, Pool(most=5, now=4, cpus=1.0, gpus=1, threads=8)),
    ],
)
def test_a_pool_fits_batches_and_nodes(nodes: tuple[Node, ...], texts: int, wanted: int | None, pool: Pool) -> None:
    assert Pool.of(texts, wanted, Cluster(nodes)) == pool


def test_a_pool_that_needs_no_gpus_takes_all_cpus() -> None:
    pool = Pool(most=64, now=32, cpus=1.0, gpus=0, threads=1)
    assert Pool.of(MANY, 64, Cluster(GPUS), on_gpus=False) == pool


def test_an_actor_takes_texts_or_their_tokens(tmp_path: Path) -> None:
    recipe, progress = EncoderRecipe(save_random_model(tmp_path / "model"), Embedding(), tmp_path), MagicMock()
    encoder = TextEncoder(recipe.local, device="cpu")
    rows = pa.table({"id": [1, 2, 3], "source": ["a", "b", "a"], "text": ["one text", "", "another one, longer"]})
    led = [prompt + text for prompt, text in zip(("as a: ", "text: ", "as a: "), rows["text"].to_pylist(), strict=True)]
    expected = encoder.encode(led)
    found = EncodeTexts(recipe, 1, progress, "document", {"a": "as a: "})(rows)
    assert found.column_names == ["id", "source", "text", "vector"]
    np.testing.assert_allclose(as_matrix(found["vector"]), expected, atol=1e-5)
    alone = EncodeTexts(recipe, 1, progress, "document", None)(rows)
    np.testing.assert_allclose(
        as_matrix(alone["vector"]), encoder.encode(rows["text"].to_pylist(), "document"), atol=1e-5
    )
    tokens = rows.drop_columns("text").append_column("tokens", tokenize(encoder.tokenizer, led))
    found = EncodeTexts(recipe, 1, progress, "query", None)(tokens)
    assert found.column_names == ["id", "source", "vector"]
    np.testing.assert_allclose(as_matrix(found["vector"]), expected, atol=1e-5)
    assert [call.args for call in progress.add.remote.call_args_list] == [("embedded", 3)] * 3
