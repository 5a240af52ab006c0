"""What CONTRIBUTING lists under "Private APIs" is still there."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import load
from pipeline.training.fit import controller_timeouts
from pipeline.training.workers import Workers


def test_ray_trains_controller_takes_its_timeouts_from_the_drivers_environment(tmp_path: Path) -> None:
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    (tmp_path / "c.yaml").write_text("storage: {run: r}\n")
    config = load(tmp_path / "c.yaml", [f"storage.root={tmp_path}"], environ={})
    assert controller_timeouts(config, Workers(2, 2, 1, 0, 1)).keys() <= ENV_VARS_TO_PROPAGATE


def test_torch_has_onednns_product_of_plain_tensors() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    assert torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "").tolist() == [[3.0] * 4] * 2
