"""The torch backend, in its own module because importing torch takes seconds, and the other backends do not need it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.index.backends import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.packing import Packed
from pipeline.model.transformer import compile_layers


class TorchBackend:
    """Encodes packed tokens with torch. `device` defaults to the GPU if there is one."""

    def __init__(
        self, model: EmbeddingModel, device: str | None = None, *, bf16: bool = False, compiled: bool = False
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.width, self.bf16 = model.to(self.device), model.width, bf16
        self.best_batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        if compiled:
            backbone: Any = model.backbone
            compile_layers(backbone)

    @torch.inference_mode()
    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            vectors_ND = self.model(Packed.of(ids, offsets).to(self.device))
        return vectors_ND.float().cpu().numpy()  # type: ignore[no-any-return]
