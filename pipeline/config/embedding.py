"""The sections `embedding` and `pinecone`: which model embeds which texts, and where the vectors are stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import PathStr, Section

Host = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]
PRECISIONS = {"torch": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8")}


class Embedding(Section):
    model: PathStr | None = None
    """Folder of a checkpoint, or of a model of transformers or sentence-transformers. Default: the run's best."""
    field: Literal["auto", "anchor", "positive", "text"] = "auto"
    """Field of the record that is embedded. auto: `positive`, else `text`."""
    dimensions: int | None = Field(None, ge=1)
    """Truncate vectors to this size, one of the model's `matryoshka_dims`; by default the full size."""
    long_texts: Literal["cut", "mean", "chunks"] = "cut"
    """What to do with a text longer than the model's `max_length`. cut: truncate it. mean: encode it in windows and
    average their vectors, weighted by their tokens. chunks: each window gets a vector of its own, with the id
    `<hash of the text>#<number>` and `parent_id` in its metadata."""
    window_overlap: int = Field(32, ge=1)
    """Tokens shared by neighbouring windows of a long text."""
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Tokens encoded in one forward pass. auto: 4,096 on CPUs, 32,768 on a GPU."""
    backend: Literal["torch", "onnxruntime"] = "torch"
    """The library that runs the model."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Precision of the forward pass: fp32, bf16 (with torch) or int8 (with onnxruntime)."""
    compile: bool = False
    """Compile the layers with torch.compile: minutes before the first batch, faster batches after it."""
    max_workers: int | None = Field(None, ge=1)
    """Most encoding actors. Default: one per GPU, or one per CPU without GPUs; at most one per 1,024 texts.
    """
    vector_type: Literal["float32", "float16", "int8", "binary"] = "float32"
    """How vectors are stored. float16: half the space. int8: float16, searched by an index of 8-bit numbers from 256
    rows on. binary: float16 plus one bit per dimension, searched by Hamming distance and rescored with float16."""
    store: Literal["lancedb", "parquet", "pinecone"] = "lancedb"
    """Where vectors are stored: always in a LanceDB table; parquet and pinecone also copy them to Parquet files or to
    Pinecone."""
    uri: PathStr | None = None
    """Folder of LanceDB's tables, or of the Parquet files: relative to storage.root, absolute on disk, or in a bucket,
    as s3://bucket/folder, with credentials from the environment; by default the store's name under storage.root."""
    index: Literal["ivf_sq", "ivf_pq", "ivf_hnsw_sq"] | None = "ivf_sq"
    """Type of the vector index; null for none. `index/indexing.py` gives the cost of each."""
    index_rows: int = Field(200_000, ge=256)
    """Index the vectors from this many rows on; below, a query scans all rows. Ours: 0.2 s for 100,000."""
    max_deleted_fraction: float = Field(0.2, ge=0, le=1)
    """Stop instead of deleting more than this share of the table's documents, for example because a source is empty."""
    verify_sample: int = Field(100, ge=0)
    """Documents to encode again after each run and compare with the table; 0 for none."""

    @model_validator(mode="after")
    def _precision_fits_backend(self) -> Embedding:
        if self.precision not in PRECISIONS[self.backend]:
            allowed = " and ".join(PRECISIONS[self.backend])
            raise ValueError(f"{allowed} as the precision with backend {self.backend}")
        if self.compile and self.backend != "torch":
            raise ValueError(f"compile=false with backend {self.backend}")
        return self


class Pinecone(Section):
    """How vectors are pushed to Pinecone (`embedding.store: pinecone`). The API key is read from `api.env`."""

    host: Host | None = None
    """Control plane. Default: https://api.pinecone.io. Without a scheme, https is used."""
    index_host: Host | None = None
    """Data plane of the index. Default: the host that the control plane returns."""
    index: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,43}[a-z0-9])?$")] = "text-embedding-pipeline"
    """Name of the index: lower-case letters, digits and hyphens, up to 45."""
    namespace: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,512}$")] | None = None
    """Namespace of the vectors. Default: the run's name and the model's version, so that models do not mix."""
    create: bool = False
    """Create the index, serverless, if it does not exist."""
    cloud: Literal["aws", "gcp", "azure"] = "aws"
    """Cloud of a new index."""
    region: str = Field("us-east-1", min_length=1)
    """Region of a new index."""
    metric: Literal["cosine", "dotproduct"] = "cosine"
    """Metric of a new index; an existing index must use it. For unit vectors, `dotproduct` equals cosine."""
    metadata: list[Annotated[str, Field(min_length=1)]] | None = None
    """Metadata keys to send; you can filter by them. Default: all."""
    text_bytes: int = Field(8_000, ge=0, le=40_000)
    """Bytes of a record's text to store with its vector; Pinecone allows 40 KB of metadata. Ours."""
    requests_per_second: float = Field(50.0, gt=0)
    """Requests per second, over all processes of a job. Pinecone's limit is 100 upserts per second and namespace."""
    max_concurrency: int = Field(16, ge=1)
    """Concurrent requests, over all processes of a job."""
    batch_rows: int = Field(1_000, ge=1, le=1_000)
    """Records per request; Pinecone's limit is 1,000."""
    batch_bytes: int = Field(2_000_000, ge=50_000, le=2_000_000)
    """Bytes of a request's body; Pinecone's limit is 2 MB."""
    max_attempts: int = Field(6, ge=1)
    """Attempts per request before its records are set aside."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds to wait for a response."""
    max_wait_s: float = Field(60.0, gt=0)
    """Longest wait between two attempts, in seconds, even if the service asks for more."""
    settle_s: float = Field(60.0, ge=0)
    """Seconds to wait after a push until counts and reads show what was written. Ours: Pinecone gives no limit."""
    import_uri: Annotated[PathStr, Field(pattern=r"^(s3|gs|gcs|az|azure)://")] | None = None
    """Bucket folder (s3://bucket/folder) for a bulk import into a new namespace: rows are written there as Parquet
    files, which Pinecone then reads, in ten minutes or more. Worth it from about a million rows. Needs Pinecone's
    Standard or Enterprise plan and a serverless index without integrated embedding, hosted on AWS for s3://. At most
    1 TB per import. By default rows are upserted."""
    import_integration: str | None = None
    """Id of the storage integration (Pinecone's console, Storage integrations) that lets Pinecone read the bucket; not
    needed for a public bucket."""
