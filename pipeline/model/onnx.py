"""Exports a model as one ONNX graph: token ids in, pooled vectors out, for any number and length of texts.

    export_onnx(folder, model)                     # after export_model(checkpoint, folder); writes folder/model.onnx
    session = onnxruntime.InferenceSession("model.onnx")
    (vectors,) = session.run(None, {"input_ids": ids, "attention_mask": mask})     # (N, L) int64 → (N, D) float32

The traced model is transformers' padded one, with attention as plain matrix products, which every runtime supports.
Cost: the model is in memory twice.
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
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.hf_export import MIN_COSINE

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_FILE_BYTES = 1 << 30  # half of protobuf's limit; weights of larger models go to model.onnx.data


class PaddedEmbedder(nn.Module):
    """The module that is traced: a transformers model, pooled with one weight per token, 0 for padding."""

    def __init__(self, model: nn.Module, embedding: EmbeddingModel) -> None:
        super().__init__()
        self.model, self.head, self.projections = model, embedding.head, embedding.projections

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, L) ids and mask → (N, D); zeros for an empty text."""
        states_NLD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.head.pooling == "max":
            largest = states_NLD.masked_fill(attention_mask[:, :, None] == 0, -torch.inf).amax(dim=1)
            return self._finished(largest, attention_mask)
        place = attention_mask.cumsum(dim=1)  # 1 at the first token, the text's length from the last token on
        weights = {
            "mean": attention_mask,
            "mean_sqrt_len": attention_mask,
            "cls": attention_mask * (place == 1),
            "last": attention_mask * (place == place[:, -1:]),
            "weighted": attention_mask * place,
        }[self.head.pooling].to(states_NLD.dtype)
        divisor = weights.sum(dim=1, keepdim=True).clamp(min=1)
        divisor = divisor.sqrt() if self.head.pooling == "mean_sqrt_len" else divisor
        return self._finished((weights[:, :, None] * states_NLD).sum(dim=1) / divisor, attention_mask)

    def _finished(self, pooled_ND: Tensor, attention_mask: Tensor) -> Tensor:
        vectors = torch.where(attention_mask.sum(dim=1, keepdim=True) > 0, self.projections(pooled_ND), 0.0)
        return F.normalize(vectors, dim=-1) if self.head.normalize else vectors


def check_packages(option: str) -> None:
    """Raise ConfigError, naming the config key or CLI `option`, if a package that ONNX needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{option}: found no package {', '.join(missing)}; run pip install 'text-embedding-pipeline[onnx]'"
        )


def export_onnx(folder: Path, exported: EmbeddingModel) -> float:
    """Write `model.onnx` into the folder of an `exported` model. Returns the smallest cosine, torch to onnxruntime.

    Raises ConfigError if torch cannot trace the architecture, RuntimeError if the cosine is below MIN_COSINE.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # type: ignore[import-not-found, import-untyped]

    from pipeline.model.pretrained import open_exported

    model = open_exported(folder, attn_implementation="eager")
    embedder = PaddedEmbedder(model, exported).eval()
    path, size = folder / "model.onnx", sum(p.numel() * p.element_size() for p in model.parameters())
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # torch warns about its own deprecations and axis names
        try:
            program = torch.onnx.export(
                embedder,
                _example(model, rows=2, length=7),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["sentence_embedding"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            )
        except torch.onnx.OnnxExporterError as error:
            family, reason = model.config.model_type, type(error.__cause__ or error).__name__
            raise ConfigError(
                f"onnx: torch cannot export a {family} model as a graph ({reason}); use embedding.backend=torch, and "
                "export without --onnx"
            ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # metadata contains paths of this machine
    program.save(path, external_data=size > MAX_FILE_BYTES)
    cosine = _check(embedder, path)
    if not cosine >= MIN_COSINE:
        raise RuntimeError(
            f"found cosine {cosine:.6f} between a vector of model.onnx and the model's own; torch's export is wrong"
        )
    return cosine


@torch.inference_mode()
def _check(embedder: PaddedEmbedder, path: Path) -> float:
    """The smallest cosine between torch and onnxruntime, on batch sizes other than the traced one."""
    import onnxruntime  # type: ignore[import-not-found, import-untyped]

    session, cosines = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    for rows, length in ((1, 1), (3, 1), (1, 5), (8, 33)):
        ids, mask = _example(embedder.model, rows, length)
        (vectors,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        cosines.append(F.cosine_similarity(embedder(ids, mask), torch.from_numpy(vectors)).min())
    return float(min(cosines))


def _example(model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids and mask, (rows, length) each, for texts of 1 to `length` tokens; the first has `length`."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=chance)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=chance)
    lengths[0] = length
    return ids, (torch.arange(length) < lengths).long()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about missing image packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
