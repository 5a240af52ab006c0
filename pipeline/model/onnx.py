"""A model as one ONNX graph: token ids in, pooled vectors out, for any number of texts of any length.

    export_onnx(folder, pooling="mean", normalize=True)          # after export_model; writes folder/model.onnx
    session = onnxruntime.InferenceSession("model.onnx")
    (vectors,) = session.run(None, {"input_ids": ids, "attention_mask": mask})     # (N, L) int64 → (N, D) float32

The traced model is transformers' own padded one, with attention as plain matrix products, which every runtime knows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.model.folder import Pooling
from pipeline.model.hf_io import MIN_COSINE

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_FILE_BYTES = 1 << 30  # half of what a protobuf may hold; the weights of larger models lie in model.onnx.data


class PaddedEmbedder(nn.Module):
    """The module that is traced: a model of transformers, pooled with a weight for each token, 0 for padding."""

    def __init__(self, model: nn.Module, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, L) ids and mask → (N, D); zeros for a text without tokens."""
        states_NLD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        place = attention_mask.cumsum(dim=1)  # 1 at the first token, the length at the last one and after it
        weights = {
            "mean": attention_mask,
            "cls": attention_mask * (place == 1),
            "last": attention_mask * (place == place[:, -1:]),
            "weighted": attention_mask * place,
        }[self.pooling].to(states_NLD.dtype)
        vectors = (weights[:, :, None] * states_NLD).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def check_packages(asked_by: str) -> None:
    """Raise ConfigError where a package that ONNX needs is not installed; `asked_by` is the key or option to name."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{asked_by}: found no package {', '.join(missing)}; pip install 'text-embedding-pipeline[onnx]' brings it"
        )


def export_onnx(folder: Path, *, pooling: Pooling, normalize: bool) -> float:
    """Write `model.onnx` into an exported model's folder. Returns the smallest cosine between torch and onnxruntime.

    Raises RuntimeError where it is below MIN_COSINE.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # type: ignore[import-not-found, import-untyped]
    from transformers import AutoModel

    from pipeline.model.pretrained import quiet_transformers

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    embedder = PaddedEmbedder(model, pooling, normalize).eval()
    path, size = folder / "model.onnx", sum(p.numel() * p.element_size() for p in model.parameters())
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # about torch's own deprecations and names of axes
        program = torch.onnx.export(
            embedder,
            _example(model, rows=2, length=7),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # metadata names files of this machine
    program.save(path, external_data=size > MAX_FILE_BYTES)
    cosine = _check(embedder, path)
    if not cosine >= MIN_COSINE:
        raise RuntimeError(
            f"a vector of model.onnx is at cosine {cosine:.6f} to the model's own; torch exported it wrongly"
        )
    return cosine


@torch.inference_mode()
def _check(embedder: PaddedEmbedder, path: Path) -> float:
    """The smallest cosine between torch and onnxruntime, on batches of other sizes than the traced one."""
    import onnxruntime  # type: ignore[import-not-found, import-untyped]

    session, cosines = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    for rows, length in ((1, 1), (3, 1), (1, 5), (8, 33)):
        ids, mask = _example(embedder.model, rows, length)
        (vectors,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        cosines.append(F.cosine_similarity(embedder(ids, mask), torch.from_numpy(vectors)).min())
    return float(min(cosines))


def _example(model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids and mask, (rows, length) each, of texts of 1 to `length` tokens; the first has `length`."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=chance)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=chance)
    lengths[0] = length
    return ids, (torch.arange(length) < lengths).long()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's warnings about missing packages for images."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
