"""The `embedding` section: which model embeds which texts, how, and where the vectors go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import PathStr, Section

PRECISIONS = {"torch": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8")}


class Embedding(Section):
    model: PathStr | None = None
    """A checkpoint folder, or one of transformers or sentence-transformers; by default the run's best."""
    field: Literal["auto", "anchor", "positive", "text"] = "auto"
    """Field of the record that is embedded: `positive`, else `text`."""
    dimensions: int | None = Field(None, ge=1)
    """Cut vectors to this size, one of the model's `matryoshka_dims`; by default its width."""
    long_texts: Literal["cut", "mean", "chunks"] = "cut"
    """What becomes of a text longer than the model reads. cut: what is beyond is left out. mean: it is read in windows,
    and their vectors averaged, each weighed by its tokens. chunks: each window has a vector of its own, under the id
    `<hash of the text>#<number>`, with `parent_id` in its metadata."""
    window_overlap: int = Field(32, ge=1)
    """Tokens that windows of a long text share."""
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Tokens encoded in one forward pass. auto: 4,096 on CPUs, 32,768 on a GPU."""
    backend: Literal["torch", "onnxruntime"] = "torch"
    """What runs the model."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of the forward pass: fp32, or bf16 with torch, or int8 with onnxruntime."""
    compile: bool = False
    """Compile the layers with torch.compile: minutes before the first batch, faster batches after it."""
    max_workers: int | None = Field(None, ge=1)
    """Encoding actors at most; by default as many as the cluster has CPUs (GPUs, where there are some).

    There is never more than one for 1,024 texts.
    """
    vector_type: Literal["float32", "float16", "int8", "binary"] = "float32"
    """How vectors are kept. float16: half the space. int8: float16, searched by an index of 8-bit numbers from 256 rows
    on. binary: float16 and a bit a number, searched by Hamming distance and scored again from float16."""
    store: Literal["lancedb", "parquet", "pinecone"] = "lancedb"
    """Where vectors go: into a LanceDB table, and, if you choose parquet or pinecone, from there to a folder of Parquet
    files or to Pinecone."""
    uri: PathStr | None = None
    """Folder of LanceDB's tables, or of the Parquet files: relative to storage.root, absolute on disk, or in a bucket,
    as s3://bucket/folder, with credentials from the environment; by default the store's name under storage.root."""
    index: Literal["ivf_sq", "ivf_pq", "ivf_hnsw_sq"] | None = "ivf_sq"
    """Index over the vectors; null for none. `index/indexing.py` says what each costs."""
    index_rows: int = Field(200_000, ge=256)
    """Rows from which vectors are indexed; below, a query looks at all of them. Ours: 0.2 s for 100,000."""
    max_deleted_fraction: float = Field(0.2, ge=0, le=1)
    """Stop rather than delete more than this share of the table's documents, as after a source came back empty."""
    verify_sample: int = Field(100, ge=0)
    """Documents encoded again and compared with the table, after each embedding; 0 for none."""

    @model_validator(mode="after")
    def _go_together(self) -> Embedding:
        if self.precision not in PRECISIONS[self.backend]:
            allowed = " and ".join(PRECISIONS[self.backend])
            raise ValueError(f"{allowed} as the precision with backend {self.backend}")
        if self.compile and self.backend != "torch":
            raise ValueError(f"compile=false with backend {self.backend}")
        return self
