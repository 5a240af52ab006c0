"""On a GPU: each way to a result beside another one, or float64 on the CPU.

python -m pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import rig_of
from benchmarks.gpu_checks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
    # torch.compile keeps this warning of its own from being shown, which is too late where warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_deviations_are_small(name: str) -> None:
    deviations = list(CHECKS[name](rig_of(torch.device("cuda"), quick=False)))
    assert deviations
    assert [str(one) for one in deviations if one.is_wrong] == []
