"""What runs an encoder: torch, eager or compiled, in float32 or bfloat16; onnxruntime, in float32 or int8.

    backend = open_backend(folder, settings, onnx_folder)
    backend.vectors([[5, 6, 7], [8]])            # (2, D) float32 numpy, one row a list of token ids

int8 holds the weights of matrix products in 8 bits and finds the scale of their inputs as it goes (onnxruntime's
dynamic quantisation): faster on processors with instructions for it, at vectors that are a little off
(benchmarks/README.md says by how much).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.config import Embedding
from pipeline.model.compiled import compile_layers
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import load_model
from pipeline.model.packing import pack
from pipeline.model.reading import model_fingerprint, read_card
from pipeline.runtime.artifact import Artifact, checked
from pipeline.storage.files import fetched, scratch
from pipeline.storage.path import StoragePath

GRAPH = "model.onnx"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4_096, 32_768
"""On a CPU the states of 8,192 tokens are so large that the C library maps memory anew for each of them: MiniLM takes
15% longer (benchmarks/README.md). A GPU is idle between the kernels of small batches."""


class Backend(Protocol):
    @property
    def width(self) -> int:
        """D, the numbers in a vector."""

    @property
    def best_batch_tokens(self) -> int:
        """Tokens to give it at once where nobody says how many."""

    def vectors(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """(N, D) float32; a sequence without tokens gives the zero vector."""


class TorchBackend:
    """Packed tokens through torch. `device` defaults to the GPU where there is one."""

    def __init__(
        self, model: EmbeddingModel, device: str | None = None, *, bf16: bool = False, compiled: bool = False
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device)
        self.bf16 = bf16
        if compiled:
            backbone: Any = model.backbone
            compile_layers(backbone)

    @property
    def width(self) -> int:
        return self.model.width

    @property
    def best_batch_tokens(self) -> int:
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS

    @torch.inference_mode()
    def vectors(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            found = self.model(pack(sequences).to(self.device))
        return found.float().cpu().numpy()  # type: ignore[no-any-return]


class OnnxBackend:
    """An exported graph through onnxruntime, on padded batches. `threads` are those of one matrix product."""

    def __init__(self, path: Path, width: int, threads: int) -> None:
        import onnxruntime  # type: ignore[import-not-found, import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        there = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        self.width = width
        self.best_batch_tokens = GPU_BATCH_TOKENS if len(wanted) > 1 else CPU_BATCH_TOKENS

    def vectors(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        lengths = np.array([len(sequence) for sequence in sequences])
        mask = (np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]).astype(np.int64)
        ids = np.zeros_like(mask)
        ids[mask.astype(bool)] = [token for sequence in sequences for token in sequence]
        (found,) = self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        return np.where(lengths[:, None] > 0, found, 0).astype(np.float32)


def open_backend(
    folder: Path, settings: Embedding, graphs: StoragePath, threads: int, device: str | None = None
) -> Backend:
    """The backend that the config names. `graphs` is where `make_graph` has put onnxruntime's."""
    if settings.backend == "onnxruntime":
        graph = graph_of(folder, settings, graphs).folder
        checked(graph / GRAPH)
        return OnnxBackend(fetched(graph) / GRAPH, read_card(folder).width, threads)
    model, _ = load_model(folder)
    return TorchBackend(model, device, bf16=settings.precision == "bf16", compiled=settings.compile)


def check_backend(settings: Embedding) -> None:
    """Raise ConfigError where a package is missing."""
    if settings.backend == "onnxruntime":
        from pipeline.export.onnx import check_packages

        check_packages("embedding.backend=onnxruntime")


def graph_of(folder: Path, settings: Embedding, graphs: StoragePath) -> Artifact:
    """A model's graph, once `make_graph` has made it."""
    return Artifact(graphs, "", {"model": model_fingerprint(folder), "precision": settings.precision})


def make_graph(folder: Path, settings: Embedding, graphs: StoragePath) -> None:
    """Export a model for onnxruntime where that has not been done, quantised where the config says so."""
    graph = graph_of(folder, settings, graphs)

    def fill() -> dict[str, Any]:
        from pipeline.export.folder import export_model, quiet_transformers
        from pipeline.export.onnx import export_onnx

        quiet_transformers()
        with tempfile.TemporaryDirectory(dir=scratch()) as name:
            temporary, head = Path(name), read_card(folder).head
            export_model(folder, temporary)
            export_onnx(temporary, pooling=head.pooling, normalize=head.normalize)
            if settings.precision == "int8":
                _quantise(temporary / GRAPH)
            for file in temporary.glob(f"{GRAPH}*"):  # larger models have their weights beside the graph
                graph.output.link(file.name, file)
        return {"model": model_fingerprint(folder), "precision": settings.precision}

    graph.make(fill)


def _quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-not-found, import-untyped]

    whole = path.rename(path.with_name("whole.onnx"))
    logging.disable(logging.WARNING)  # it advises a step that changes nothing about these graphs
    try:
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    finally:
        logging.disable(logging.NOTSET)
    whole.unlink()
