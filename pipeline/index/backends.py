"""Libraries that run an encoder: numpy for a token table; torch, eager or compiled; onnxruntime, in float32 or int8.

    backend = open_backend(folder, settings, onnx_folder)
    backend.vectors(np.array([5, 6, 7, 8]), np.array([0, 3, 4]))     # (2, D) float32, of the texts [5, 6, 7] and [8]

Each library is imported on first use: a token table needs neither torch nor onnxruntime.

int8 is onnxruntime's dynamic quantisation: 8-bit weights in matrix products, and activations scaled at run time. It is
faster on processors with int8 instructions, and slightly less accurate (numbers in benchmarks/README.md).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import Embedding
from pipeline.core.artifact import Artifact, checked
from pipeline.core.files import local_copy, scratch
from pipeline.core.path import StoragePath
from pipeline.index.vectors import unit
from pipeline.model.folder import ModelSpec, is_table, model_fingerprint, read_model_spec, table_weights

GRAPH = "model.onnx"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4_096, 32_768
"""On a CPU, 8,192 tokens make MiniLM 15% slower, as malloc then maps fresh memory for every activation
(benchmarks/README.md). A GPU idles between the kernels of small batches."""


class Backend(Protocol):
    @property
    def width(self) -> int:
        """D, the size of a vector."""

    @property
    def best_batch_tokens(self) -> int | None:
        """Default tokens per batch. None: batches of any size, in any order."""

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Encode (T,) token ids with (N + 1,) offsets to (N, D) float32; no tokens give the zero vector."""


class TableBackend:
    """A token table in numpy: pools each text's rows, which are normalised once.

    torch's embedding_bag takes 0.6 s instead of 1.9 s for 131,698 texts of 107 tokens (one core, 256 dimensions), but
    importing torch takes 2.4 s. Rows are summed in token order, so results are bitwise equal for any batch.
    """

    best_batch_tokens = None

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        weights = table_weights(folder)
        self.rows_VD, self.width, self.head = weights["embed_tokens.weight"], spec.width, spec.head
        mean_squares_V1 = np.square(self.rows_VD).mean(axis=1, keepdims=True)
        self.rows_VD *= weights["norm.weight"] / np.sqrt(mean_squares_V1 + np.float32(spec.shape["norm_eps"]))

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        vectors_ND, lengths = np.zeros((len(offsets) - 1, self.width), np.float32), np.diff(offsets)
        nonempty, pooling = np.flatnonzero(lengths), self.head.pooling
        if pooling in ("cls", "last"):
            positions = offsets[nonempty] if pooling == "cls" else offsets[nonempty + 1] - 1
            vectors_ND[nonempty] = self.rows_VD[ids[positions]]
        elif pooling == "max":
            for i in nonempty.tolist():
                np.max(self.rows_VD.take(ids[offsets[i] : offsets[i + 1]], axis=0), axis=0, out=vectors_ND[i])
        else:
            total = np.maximum(self._sums(ids, offsets, nonempty, vectors_ND), 1)
            vectors_ND /= (np.sqrt(total) if pooling == "mean_sqrt_len" else total)[:, None].astype(np.float32)
        return unit(vectors_ND) if self.head.normalize else vectors_ND

    def _sums(self, ids: np.ndarray, offsets: np.ndarray, nonempty: np.ndarray, out_ND: np.ndarray) -> np.ndarray:
        """Write the sums of the nonempty texts into `out_ND`. Returns the (N,) sums of the tokens' weights."""
        bounds, lengths, weighted = offsets.tolist(), np.diff(offsets).astype(np.int64), self.head.pooling == "weighted"
        for i in nonempty.tolist():
            rows_LD = self.rows_VD.take(ids[bounds[i] : bounds[i + 1]], axis=0)
            if weighted:
                rows_LD *= np.arange(1, len(rows_LD) + 1, dtype=np.float32)[:, None]
            np.add.reduce(rows_LD, axis=0, out=out_ND[i])
        return lengths * (lengths + 1) // 2 if weighted else lengths


class OnnxBackend:
    """Runs an exported graph with onnxruntime, on padded batches. `threads` is for one matrix product."""

    def __init__(self, path: Path, width: int, threads: int) -> None:
        import onnxruntime  # type: ignore[import-not-found, import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.width = width
        self.best_batch_tokens = GPU_BATCH_TOKENS if len(providers) > 1 else CPU_BATCH_TOKENS

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        lengths = np.diff(offsets)
        mask_NL = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids_NL = np.zeros(mask_NL.shape, np.int64)
        ids_NL[mask_NL] = ids
        (vectors_ND,) = self.session.run(None, {"input_ids": ids_NL, "attention_mask": mask_NL.astype(np.int64)})
        return np.where(lengths[:, None] > 0, vectors_ND, 0).astype(np.float32)


def open_backend(
    folder: Path, settings: Embedding, graphs: StoragePath, threads: int | None = None, device: str | None = None
) -> Backend:
    """Open the config's backend. `graphs` is the folder of onnxruntime's graphs, made by `make_graph`.

    `threads` is for one matrix product, by default the backend's choice; torch applies it to the whole process.
    """
    if settings.backend == "onnxruntime":
        graph = graph_of(folder, settings, graphs).folder
        checked(graph / GRAPH)
        return OnnxBackend(local_copy(graph) / GRAPH, read_model_spec(folder).width, threads or 0)
    return model_backend(folder, threads, device, bf16=settings.precision == "bf16", compiled=settings.compile)


def model_backend(
    folder: Path, threads: int | None = None, device: str | None = None, *, bf16: bool = False, compiled: bool = False
) -> Backend:
    """Open numpy for a token table, torch for any other model."""
    spec = read_model_spec(folder)
    if is_table(spec):
        return TableBackend(folder, spec)
    import torch

    from pipeline.index.torch_backend import TorchBackend
    from pipeline.model.folder import load_model

    if threads:
        torch.set_num_threads(threads)
    return TorchBackend(load_model(folder)[0], device, bf16=bf16, compiled=compiled)


def graph_of(folder: Path, settings: Embedding, graphs: StoragePath) -> Artifact:
    """The artifact of a model's graph, which `make_graph` makes."""
    return Artifact(graphs, "", {"model": model_fingerprint(folder), "precision": settings.precision})


def make_graph(folder: Path, settings: Embedding, graphs: StoragePath) -> None:
    """Export a model for onnxruntime unless its graph exists; quantise it if the config asks for int8.

    Raises ConfigError if a package is missing.
    """
    from pipeline.model.onnx import check_packages

    check_packages("embedding.backend=onnxruntime")
    graph = graph_of(folder, settings, graphs)

    def fill() -> dict[str, Any]:
        from pipeline.model.folder import load_model
        from pipeline.model.hf_export import export_model
        from pipeline.model.onnx import export_onnx

        with tempfile.TemporaryDirectory(dir=scratch()) as name:
            temporary = Path(name)
            export_model(folder, temporary)
            export_onnx(temporary, load_model(folder)[0])
            if settings.precision == "int8":
                _quantise(temporary / GRAPH)
            for file in temporary.glob(f"{GRAPH}*"):  # larger models store their weights in a second file
                graph.output.link(file.name, file)
        return {"model": model_fingerprint(folder), "precision": settings.precision}

    graph.make(fill)


def _quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-not-found, import-untyped]

    original = path.rename(path.with_name("whole.onnx"))
    logging.disable(logging.WARNING)  # it recommends pre-processing, which does not change these graphs
    try:
        quantize_dynamic(original, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    finally:
        logging.disable(logging.NOTSET)
    original.unlink()
