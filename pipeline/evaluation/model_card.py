"""Writes the model card: the README.md of an export, in the format of model hubs.

    origin = read_origin(checkpoint, run_dir)       # from the files of the checkpoint's run
    model_card(read_card(checkpoint), origin, "quickstart", "mit", "tep evaluate")

Empty sections are left out: a checkpoint copied out of its run shows no data, settings or scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.core.files import local_copy, sorted_glob
from pipeline.core.path import StoragePath, absolute
from pipeline.data.manifest import Manifest, read_prepared
from pipeline.evaluation.report import score_rows
from pipeline.model.folder import ModelSpec, model_fingerprint

SECTIONS = ("model", "objective", "training")  # of the run's config; the other sections hold local paths
TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "text-embeddings")
LIMITS = """## Limits

A text without tokens, such as the empty string, has no vector. Depending on the library that runs the model, it may
return zeros or the vector of padding, or raise an error if it is the only text of a batch."""
POOLINGS = {
    "mean": "the mean of a text's states",
    "cls": "the first token's state",
    "last": "the last token's state",
    "weighted": "a mean of a text's states in which the i-th has weight i",
    "max": "the largest of a text's states in each dimension",
    "mean_sqrt_len": "the sum of a text's states over the root of their number",
}
SHAPE_KEYS = {  # of model.json: our names, then those of transformers
    *("vocab_size", "norm_eps", "positions", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads"),
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
}


@dataclass(frozen=True)
class Origin:
    """What is known about a model's training."""

    settings: dict[str, Any] = field(default_factory=dict)  # sections of config.resolved.yaml
    state: dict[str, Any] = field(default_factory=dict)  # the checkpoint's state.json
    run: dict[str, Any] = field(default_factory=dict)  # run.json
    manifest: Manifest | None = None
    scores: dict[str, Any] = field(default_factory=dict)  # of evaluation.json, if it scored this model
    verdicts: list[str] = field(default_factory=list)  # of the same: a sentence for BM25 and the base on each task


def read_origin(checkpoint: StoragePath, scored_in: StoragePath) -> Origin:
    """Read the files of the checkpoint's run. Almost empty for a checkpoint outside <root>/runs/<run>/best/step-….

    `scored_in` is a run folder with evaluation.json; its scores are used only if they belong to this model.
    """
    run_dir = absolute(checkpoint).parent.parent
    run, scored = _read_json(run_dir / "run.json"), _read_json(scored_in / "evaluation.json")
    resolved = run_dir / "config.resolved.yaml"
    settings = yaml.safe_load(resolved.read_text(encoding="utf-8")) if run and resolved.is_file() else {}
    prepared = sorted_glob(run_dir.parent.parent, "prepared/*/manifest.json") if run else []
    manifests = (read_prepared(path.parent) for path in prepared)
    belongs = scored.get("of", {}).get("model") == model_fingerprint(local_copy(checkpoint))
    return Origin(
        settings={name: settings[name] for name in SECTIONS if name in settings},
        state=_read_json(checkpoint / "state.json"),
        run=run,
        manifest=next((m for m in manifests if m and m.fingerprint == run["data_fingerprint"]), None),
        scores=scored["scores"] if belongs else {},
        verdicts=[each["sentence"] for each in scored["comparisons"] if each["other"] != "previous"] if belongs else [],
    )


def model_card(
    spec: ModelSpec,
    origin: Origin,
    name: str,
    license_id: str | None,
    evaluate_command: str,
    *,
    onnx: bool = False,
    embeddings: int = 0,
) -> str:
    """The text of README.md. `license_id` is the hub's identifier, such as `apache-2.0`, or None.

    `onnx` says whether the export has a graph; `embeddings` is the number of exported vectors.
    """
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [*TAGS, *(["onnx"] if onnx else [])],
        **({"license": license_id} if license_id else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        _summary(spec),
        _usage(spec, name, onnx, embeddings),
        _model(spec),
        _data(origin.manifest) if origin.manifest else "",
        _training(origin) if origin.run else "",
        _scores(origin, evaluate_command),
        LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(spec: ModelSpec) -> str:
    length = " of unit length" if spec.head.normalize else ""
    text = (
        f"Maps texts to vectors of {spec.width} numbers{length}; texts of similar meaning have a high cosine. "
        f"Only the first {spec.max_length} tokens of a text are used."
    )
    if spec.head.dimensions:
        sizes = ", ".join(map(str, spec.head.dimensions))
        text += (
            f" Vectors were trained to be cut to {sizes} as well (Matryoshka): "
            f"`truncate_dim={spec.head.dimensions[-1]}`, and `normalize_embeddings=True` for unit length again."
        )
    return text


def _usage(spec: ModelSpec, name: str, onnx: bool, embeddings: int) -> str:
    unit = ", at unit length" if spec.head.normalize else ""
    vector = POOLINGS[spec.head.pooling] + (", through the Dense modules" if spec.head.projections else "") + unit
    text = f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")  # this folder
queries = model.encode_query(["remove duplicate rows"])
documents = model.encode_document(["def dedup(rows): return list(dict.fromkeys(rows))"])
print(model.similarity(queries, documents))
```

`AutoModel.from_pretrained("{name}")` gives the token states; the vector is {vector}.
Neither runs code from this folder."""
    prompts = "".join(f"\n- `{kind}`: `{prompt!r}`" for kind, prompt in spec.head.prompts if prompt)
    if prompts:
        text += f"\n\n`encode_query` and `encode_document` add the prompts that the model was trained with:\n{prompts}"
    if onnx:
        text += (
            "\n\n`model.onnx` takes `input_ids` and `attention_mask`, (texts, tokens) int64, and gives "
            "`sentence_embedding`, (texts, numbers) float32, pooled already."
        )
    if embeddings:
        text += (
            f"\n\n`embeddings/` holds {embeddings:,} vectors for use inside another model: `weight` in "
            "`embeddings.safetensors` is for `torch.nn.Embedding.from_pretrained`, and `ids.parquet` names the record "
            "of each row."
        )
    return text


def _model(spec: ModelSpec) -> str:
    facts = {"architecture": "EuroBERT (`hidden_act: gelu`)"} if spec.architecture == "unified" else {}
    facts |= {key: str(value) for key, value in spec.shape.items() if key in SHAPE_KEYS and value is not None}
    facts |= {"pooling": spec.head.pooling, "normalize": str(spec.head.normalize).lower()}
    return "## Model\n\n" + _table(("", ""), facts.items())


def _data(manifest: Manifest) -> str:
    rows = [(source.name, f"{source.rows_in:,}", f"{source.rows_kept:,}") for source in manifest.sources]
    splits = ", ".join(f"{count:,} in {name}" for name, count in manifest.splits.items())
    table = _table(("source", "records in", "kept"), rows)
    return f"## Data\n\n{table}\n\nRecords: {splits}. Fingerprint `{manifest.fingerprint}`."


def _training(origin: Origin) -> str:
    facts = [f"{origin.state['step']:,} steps"] if "step" in origin.state else []
    facts += [f"{origin.state['train_seconds']:.0f} s of training"] if "train_seconds" in origin.state else []
    facts += [f"{package} {version}" for package, version in origin.run.get("versions", {}).items()]
    facts += [f"commit `{origin.run['git_sha'][:12]}`"] if origin.run.get("git_sha") else []
    settings = yaml.safe_dump(_without_nulls(origin.settings), sort_keys=False)
    return f"## Training\n\n{', '.join(facts)}.\n\n```yaml\n{settings}```"


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return tree


def _scores(origin: Origin, command: str) -> str:
    rows = [
        (task, system, ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
        for task, system, values in score_rows(origin.scores)
    ]
    if not rows:
        return ""
    table = _table(("task", "", "scores"), rows)
    verdicts = "\n\n" + "\n".join(f"- {sentence}" for sentence in origin.verdicts) if origin.verdicts else ""
    return f"## Scores\n\n{table}{verdicts}\n\nTo reproduce them with the run and its data:\n\n```\n{command}\n```"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _read_json(path: StoragePath) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
