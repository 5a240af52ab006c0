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
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file

from pipeline.config import Embedding
from pipeline.embedding.nearest import unit
from pipeline.model.card import Card
from pipeline.model.reading import is_table, model_fingerprint, read_card
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
    def best_batch_tokens(self) -> int | None:
        """Tokens to give it at once where nobody says how many. None: any number, in any order."""

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """(N, D) float32, of (T,) token ids and (N + 1,) offsets; a text without tokens gives the zero vector."""


class TableBackend:
    """A token table: the mean of each text's rows, which are normalised once. numpy alone.

    torch's embedding_bag takes a third of the time, and importing torch as long as 170,000 texts of 107 tokens do here
    (69,000/s on one core). Sums are those of embedding_bag to the bit, in the order of the tokens, whatever the batch.
    """

    best_batch_tokens = None

    def __init__(self, folder: Path, card: Card) -> None:
        weights = load_file(folder / "model.safetensors")
        self.rows_VD, self.width, self.head = weights["embed_tokens.weight"], card.width, card.head
        mean_squares_V1 = np.square(self.rows_VD).mean(axis=1, keepdims=True)
        self.rows_VD *= weights["norm.weight"] / np.sqrt(mean_squares_V1 + np.float32(card.shape["norm_eps"]))

    def vectors(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        found_ND = np.zeros((len(offsets) - 1, self.width), np.float32)
        for (start, stop), out_D in zip(pairwise(offsets.tolist()), found_ND, strict=True):
            if start < stop:
                self._pool(ids[start:stop], out_D)
        return unit(found_ND) if self.head.normalize else found_ND

    def _pool(self, ids_L: np.ndarray, out_D: np.ndarray) -> None:
        if self.head.pooling in ("cls", "last"):
            out_D[:] = self.rows_VD[ids_L[0 if self.head.pooling == "cls" else -1]]
            return
        rows_LD, total = self.rows_VD.take(ids_L, axis=0), len(ids_L)
        if self.head.pooling == "weighted":
            rows_LD *= np.arange(1, total + 1, dtype=np.float32)[:, None]
            total = total * (total + 1) // 2
        np.add.reduce(rows_LD, axis=0, out=out_D)
        out_D /= total


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

    from pipeline.embedding.torch_backend import TorchBackend
    from pipeline.model.folder import load_model

    if threads:
        torch.set_num_threads(threads)
    return TorchBackend(load_model(folder)[0], device, bf16=bf16, compiled=compiled)


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
