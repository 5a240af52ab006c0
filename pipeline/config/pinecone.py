"""How vectors go to Pinecone (`embedding.store: pinecone`). The key is no part of the config: see `api.env`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import PathStr, Section

Host = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]


class Pinecone(Section):
    host: Host | None = None
    """Control plane, such as https://api.pinecone.io, which is the default; a scheme that is missing is https."""
    index_host: Host | None = None
    """Data plane of the index; by default asked of the control plane."""
    index: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,43}[a-z0-9])?$")] = "text-embedding-pipeline"
    """Name of the index: lower-case letters, digits and hyphens, up to 45."""
    namespace: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,512}$")] | None = None
    """Namespace of the vectors; by default the run's name and the model's version, so that models do not mix."""
    create: bool = False
    """Create the index, serverless, where there is none."""
    cloud: Literal["aws", "gcp", "azure"] = "aws"
    """Cloud of an index that is created."""
    region: str = Field("us-east-1", min_length=1)
    """Region of an index that is created."""
    metric: Literal["cosine", "dotproduct"] = "cosine"
    """Metric of an index that is created, and that one must have that is there. `dotproduct` gives
    cosines where vectors have unit length."""
    metadata: list[Annotated[str, Field(min_length=1)]] | None = None
    """Keys of the records' metadata that are sent, and can be filtered by; by default all."""
    text_bytes: int = Field(8_000, ge=0, le=40_000)
    """Bytes of a record's text that are kept beside its vector, of the 40 KB that its metadata may have. Ours."""
    requests_per_second: float = Field(50.0, gt=0)
    """Requests of all processes of a job together. Pinecone's own limit is 100 upserts a second and namespace."""
    max_concurrency: int = Field(16, ge=1)
    """Requests of all processes of a job that are under way at once."""
    batch_rows: int = Field(1_000, ge=1, le=1_000)
    """Records a request; 1,000 are Pinecone's limit."""
    batch_bytes: int = Field(2_000_000, ge=50_000, le=2_000_000)
    """Bytes of a request's body; 2 MB are Pinecone's limit."""
    max_attempts: int = Field(6, ge=1)
    """Times that a request is sent before its records are set aside."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds to wait for an answer."""
    max_wait_s: float = Field(60.0, gt=0)
    """Longest wait between two attempts, in seconds, whatever the service asks for."""
    settle_s: float = Field(60.0, ge=0)
    """Seconds to wait, after a push, until counts and reads show what was written. Pinecone names no limit; ours."""
    import_uri: Annotated[PathStr, Field(pattern=r"^(s3|gs|gcs|az|azure)://")] | None = None
    """Folder in a bucket, as s3://bucket/folder, through which a namespace that does not exist yet is filled: the rows
    are written there as Parquet files, which Pinecone then reads by itself, in ten minutes at least. Worth it from
    about a million rows on. It needs Pinecone's Standard or Enterprise plan, a serverless index without integrated
    embedding, and for s3:// one that is hosted on AWS. At most 1 TB an import. By default rows are upserted."""
    import_integration: str | None = None
    """Id of the storage integration (Pinecone's console, Storage integrations) by which Pinecone may read the bucket;
    not needed for a public one."""
