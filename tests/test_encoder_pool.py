"""How many encoders a cluster gets, and what each of them takes."""

import pytest

from pipeline.embedding.embed import Pool
from pipeline.runtime.cluster import Cluster, Node

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
