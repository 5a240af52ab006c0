"""What runs an encoder: numpy for a token table; torch, eager or compiled; onnxruntime, in float32 or int8.

    backend = open_backend(folder, settings, onnx_folder)
    backend.vectors(np.array([5, 6, 7, 8]), np.array([0, 3, 4]))     # (2, D) float32, of the texts [5, 6, 7] and [8]

Only what is opened is imported: a table needs neither torch nor onnxruntime.

int8 holds the weights of matrix products in 8 bits and finds the scale of their inputs as it goes (onnxruntime's
dynamic quantisation): faster on processors with instructions for it, at vectors that are a little off
(benchmarks/README.md says by how much).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file

from pipeline.config import Embedding
from pipeline.core.artifact import Artifact, checked
from pipeline.core.files import fetched, scratch
from pipeline.core.path import StoragePath
from pipeline.index.vectors import unit
from pipeline.model.folder import Card, is_table, model_fingerprint, read_card

GRAPH = "model.onnx"
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4_096, 32_768
"""On a CPU the states of 8,192 tokens are so large that the C library maps memory anew for each of them: MiniLM takes
15% longer (benchmarks/README.md). A GPU is idle between the kernels of small batches."""


class Backend(Protocol):
    @property
    def width(self) -> int:
        """D, the numbers in a vector."""

    @property
    def best_batch_tokens(self) -> int | None:
        """Tokens to give it at once where nobody says how many. None: any number, in any order."""

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """(N, D) float32, of (T,) token ids and (N + 1,) offsets; a text without tokens gives the zero vector."""


class TableBackend:
    """A token table: the mean of each text's rows, which are normalised once. numpy alone.

    torch's embedding_bag takes 0.6 s instead of 1.9 s for 131,698 texts of 107 tokens (one core, 256 numbers), but
    importing torch 2.4 s. Sums are added in the order of the tokens: equal to the bit, whatever the batch.
    """

    best_batch_tokens = None

    def __init__(self, folder: Path, card: Card) -> None:
        weights = load_file(folder / "model.safetensors")
        self.rows_VD, self.width, self.head = weights["embed_tokens.weight"], card.width, card.head
        mean_squares_V1 = np.square(self.rows_VD).mean(axis=1, keepdims=True)
        self.rows_VD *= weights["norm.weight"] / np.sqrt(mean_squares_V1 + np.float32(card.shape["norm_eps"]))

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        found_ND, lengths = np.zeros((len(offsets) - 1, self.width), np.float32), np.diff(offsets)
        some, pooling = np.flatnonzero(lengths), self.head.pooling
        if pooling in ("cls", "last"):
            found_ND[some] = self.rows_VD[ids[offsets[some] if pooling == "cls" else offsets[some + 1] - 1]]
        else:
            total = self._sums(ids, offsets, some, found_ND)
            found_ND /= np.maximum(total, 1)[:, None].astype(np.float32)
        return unit(found_ND) if self.head.normalize else found_ND

    def _sums(self, ids: np.ndarray, offsets: np.ndarray, some: np.ndarray, out_ND: np.ndarray) -> np.ndarray:
        """Sums of the texts that have tokens, into `out_ND`. Returns the (N,) sums of their tokens' weights."""
        bounds, lengths, weighted = offsets.tolist(), np.diff(offsets).astype(np.int64), self.head.pooling == "weighted"
        for i in some.tolist():
            rows_LD = self.rows_VD.take(ids[bounds[i] : bounds[i + 1]], axis=0)
            if weighted:
                rows_LD *= np.arange(1, len(rows_LD) + 1, dtype=np.float32)[:, None]
            np.add.reduce(rows_LD, axis=0, out=out_ND[i])
        return lengths * (lengths + 1) // 2 if weighted else lengths


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

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        lengths = np.diff(offsets)
        mask_NL = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids_NL = np.zeros(mask_NL.shape, np.int64)
        ids_NL[mask_NL] = ids
        (found,) = self.session.run(None, {"input_ids": ids_NL, "attention_mask": mask_NL.astype(np.int64)})
        return np.where(lengths[:, None] > 0, found, 0).astype(np.float32)


def open_backend(
    folder: Path, settings: Embedding, graphs: StoragePath, threads: int | None = None, device: str | None = None
) -> Backend:
    """The backend that the config names. `graphs` is where `make_graph` has put onnxruntime's.

    `threads` of one matrix product, by default all that the backend wants; torch's are set for the process.
    """
    if settings.backend == "onnxruntime":
        graph = graph_of(folder, settings, graphs).folder
        checked(graph / GRAPH)
        return OnnxBackend(fetched(graph) / GRAPH, read_card(folder).width, threads or 0)
    return model_backend(folder, threads, device, bf16=settings.precision == "bf16", compiled=settings.compile)


def model_backend(
    folder: Path, threads: int | None = None, device: str | None = None, *, bf16: bool = False, compiled: bool = False
) -> Backend:
    """numpy for a token table, torch for all else."""
    card = read_card(folder)
    if is_table(card):
        return TableBackend(folder, card)
    import torch

    from pipeline.index.torch_backend import TorchBackend
    from pipeline.model.folder import load_model

    if threads:
        torch.set_num_threads(threads)
    return TorchBackend(load_model(folder)[0], device, bf16=bf16, compiled=compiled)


def graph_of(folder: Path, settings: Embedding, graphs: StoragePath) -> Artifact:
    """A model's graph, once `make_graph` has made it."""
    return Artifact(graphs, "", {"model": model_fingerprint(folder), "precision": settings.precision})


def make_graph(folder: Path, settings: Embedding, graphs: StoragePath) -> None:
    """Export a model for onnxruntime where that has not been done, quantised where the config says so.

    Raises ConfigError where a package is missing.
    """
    from pipeline.model.onnx import check_packages

    check_packages("embedding.backend=onnxruntime")
    graph = graph_of(folder, settings, graphs)

    def fill() -> dict[str, Any]:
        from pipeline.model.hf_io import export_model
        from pipeline.model.onnx import export_onnx

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
