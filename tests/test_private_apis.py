"""What CONTRIBUTING lists under "Private APIs": each is still there, and still needed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pinecone import Pinecone as Client
from pinecone.index import Index

from pipeline.config import Pinecone, load
from pipeline.index.embed import READ_CPUS
from pipeline.index.pinecone_client import PineconeClient
from pipeline.training.fit import controller_timeouts
from pipeline.training.workers import Workers
from tests.pinecone_server import pinecone_server

ROOT = Path(__file__).parents[1]


def test_no_private_module_of_ray_is_imported() -> None:
    private = re.compile(r"ray\._private|ray\._raylet|ray\.\w+\._internal|_global_node|__class__ *=[^=]")
    found = [path for path in (ROOT / "pipeline").rglob("*.py") if private.search(path.read_text("utf-8"))]
    assert found == []


def test_pinecones_data_plane_takes_no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "retry_config" in inspect.signature(Client).parameters
    assert "retry_config" not in inspect.signature(Index).parameters  # once it is, index._http can go
    monkeypatch.setenv("PINECONE_API_KEY", "k")
    with pinecone_server("k") as server:
        settings = Pinecone(host=server.url, index_host=f"{server.url}/data/i")
        index = PineconeClient(settings, []).index
        server.faults = {"503": 1.0}
        with pytest.raises(Exception, match="503"):
            index.describe_index_stats()
        assert len(server.requests) == 1


def test_onednns_product() -> None:
    a, b = torch.randn(5, 3), torch.randn(4, 3)
    product = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    torch.testing.assert_close(product, a @ b.t())


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("cpus", "operators"), [(READ_CPUS, 2), (0.25, 1)])
def test_equal_cpus_fuse_two_operators_and_ours_do_not(cpus: float, operators: int) -> None:
    import ray.data

    class Encode:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    pool = ray.data.ActorPoolStrategy(size=1)
    dataset = ray.data.range(4, override_num_blocks=2).map_batches(read, num_cpus=cpus)
    stats = dataset.map_batches(Encode, compute=pool, num_cpus=0.25).materialize().stats()
    names = re.findall(r"^Operator \d+ (.*?):", stats, re.MULTILINE)
    assert len([name for name in names if "MapBatches" in name]) == operators, stats


def test_ray_trains_controller_takes_its_timeouts_from_the_drivers_environment(tmp_path: Path) -> None:
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    (tmp_path / "c.yaml").write_text("storage: {run: r}\n")
    config = load(tmp_path / "c.yaml", [f"storage.root={tmp_path}"], environ={})
    assert controller_timeouts(config, Workers(2, 2, 1, 0, 1)).keys() <= ENV_VARS_TO_PROPAGATE
