"""The sections `data` and `tokenizer`: where records come from, how they are filtered, and how they are tokenized."""

from __future__ import annotations

from typing import Literal

import regex
from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Name, PathStr, Section, Share

TextField = Literal["text", "anchor", "positive", "negatives"]
SHAPES = ({"text"}, {"anchor", "positive"}, {"anchor", "positive", "negatives"})
QualityPreset = Literal["none", "web", "short", "code"]


class Source(Section):
    name: Name
    """Name of the source, in the manifest and in each record's `source_id`."""
    type: Literal["text", "json", "csv", "parquet", "arrow", "huggingface", "python_packages"]
    """text: see `record`. json: JSON Lines, or one JSON array of objects per file. csv: with a header line; .tsv files
    are tab-separated. arrow: Arrow files, streams and Feather. huggingface: a data set of the hub, or its folder.
    python_packages: the functions and classes of the installed packages, without their tests (folders and modules
    named tests, testing, test_*, …). Files ending in .gz or .zst are decompressed. Text, json and csv are UTF-8, or
    UTF-16 or UTF-32 with a byte order mark."""
    path: PathStr | None = None
    """A file, a folder or a glob, on local disk, s3://, gs:// or az:// (with options such as `?region=eu-west-1` or
    `?anonymous=true`). huggingface: the data set's name. python_packages: a folder of packages, by default this
    Python's site-packages."""
    follow_symlinks: bool = False
    """Whether to read files that links in `path` lead to outside of it. `path` may itself be a link."""
    record: Literal["file", "paragraph", "line"] = "file"
    """Text sources: the unit that becomes a record. A file has the fields `title` (from its front matter, a title
    keyword or its first line), `body` (the rest) and `text` (without front matter); a paragraph or a line has
    `text`."""
    pairs: Literal["heading", "neighbours"] | None = None
    """Text sources: make pairs of a file's parts, with the fields `anchor` and `positive`. heading: each section, with
    its heading and those above it as anchor. neighbours: each paragraph of 50 characters or more, with the one before
    it as anchor (the first with the one after it)."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between the cells of a csv source; by default a tab in .tsv files, else a comma."""
    config: str | None = None
    """huggingface: the data set's configuration."""
    split: str = "train"
    """huggingface: the data set's split."""
    revision: str | None = None
    """huggingface: the commit or tag. Without it, the data may change whenever its owner changes it."""
    fields: dict[TextField | Literal["id"], str] = {}
    """Record field → the source's field, with dots for nested fields. Default: fields of the same name; for text files
    `title` → `body`, for python_packages `docstring` → `code`. A list of texts is joined by blank lines."""
    metadata: list[str] = []
    """Other fields of the source to keep with each record. pipeline/data/fields.py lists how types are converted."""
    prompts: dict[TextField, str] = {}
    """Record field → prompt that is prepended before tokenizing, such as {anchor: "query: "}. Not part of the id.
    Search and evaluation prepend the anchor's prompt to queries if it is the same for all sources."""
    weight: float | None = Field(None, gt=0)
    """Share of training batches, relative to the other sources' weights. Default: proportional to the number of
    rows."""
    max_samples: int | None = Field(None, ge=1)
    """Read at most this many records, the first in the source's order."""
    quality: QualityPreset | None = None
    """This source's preset, instead of `data.quality.preset`."""

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        if self.path is None and self.type != "python_packages":
            raise ValueError(f"a source of type {self.type} with a `path`")
        mapped = set(self.fields) - {"id"}
        if mapped and mapped not in SHAPES:
            raise ValueError("`fields` that map either `text`, or `anchor` and `positive`, with `negatives` or without")
        if self.pairs and self.record != "file":
            raise ValueError(f"`pairs` only with record=file, not {self.record}")
        for key, kind in _OF_TYPE.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.type != kind:
                raise ValueError(f"`{key}` only on sources of type {kind}, not {self.type}")
        return self


_OF_TYPE = {"record": "text", "pairs": "text", "delimiter": "csv"} | dict.fromkeys(
    ("config", "split", "revision"), "huggingface"
)


class Sanitize(Section):
    nfc: bool = True
    """Compose characters (Unicode NFC)."""
    repair_mojibake: bool = True
    """Undo text that was decoded with the wrong encoding: "schÃ¶n" becomes "schön" (ftfy). Fields with more than 25,000
    characters of mojibake in several encodings are rejected."""
    remove_controls: bool = True
    """Remove control characters other than newline and tab."""
    remove_zero_width: bool = True
    """Remove zero-width spaces, soft hyphens and byte order marks; joiners, which scripts and emoji need, are kept."""
    remove_bidi_overrides: bool = True
    """Remove characters that make text display in another order than it is stored."""
    whitespace: Literal["auto", "collapse", "keep"] = "auto"
    """collapse: one space instead of several, at most one empty line. keep: keep indentation and spaces inside lines.
    auto: keep for the quality preset `code` and for python_packages, else collapse."""
    lowercase: bool = False
    """Lower-case the records; `tokenizer.lowercase` only lower-cases tokens."""
    allowed_characters: str | None = None
    """A character class in regex's syntax such as '\\p{L}\\p{N}\\p{P}\\s'; characters outside it are removed."""

    @field_validator("allowed_characters")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                regex.compile(f"[^{value}]")
        except regex.error as error:
            raise ValueError(f"the inside of a character class such as '\\p{{L}}\\p{{N}}\\s' ({error})") from None
        return value


class Safety(Section):
    rules: PathStr | None = None
    """A YAML file with your own rules; by default pipeline/data/safety_rules.yaml."""
    actions: dict[str, Literal["keep", "redact", "reject"]] = {}
    """Rule or category → what to do with its matches, instead of the rule's own action: `{email: redact}`."""


class Quality(Section):
    preset: QualityPreset = "none"
    """web: Gopher, C4 and FineWeb rules, for pages. short: for titles, descriptions and questions. code: for programs.
    Applied to the field that is searched (`positive`, else `text`)."""
    thresholds: dict[str, float] = {}
    """Thresholds that replace the preset's; pipeline/data/quality.py lists them with their sources."""
    languages: list[str] = []
    """Keep only records in these languages (ISO 639-1 codes such as en); [] keeps all."""
    min_language_score: Share = 0.65
    """Smallest probability of the identified language (FineWeb, section 3.3)."""


class NearDuplicates(Section):
    threshold: float | None = Field(None, gt=0, le=1)
    """Jaccard similarity of 5-word shingles from which a record is a near-duplicate; null: remove only exact
    duplicates. 0.8 is the usual choice (Lee et al. 2022, section 4.2)."""
    permutations: int = Field(256, ge=16, le=1024)
    """Length of a MinHash signature. Bands are chosen so that a pair at the threshold is detected with probability
    0.99."""


class Augment(Section):
    word_dropout: Share = 0.0
    """Share of an anchor's words that are deleted."""
    span_masking: Share = 0.0
    """Share of an anchor's words that are replaced by [MASK], in spans of three on average (SpanBERT, section 3.1)."""
    truncation: Share = 0.0
    """Largest share of an anchor's words that is cut from its end."""


class Data(Section):
    sources: list[Source] = Field([Source(name="packages", type="python_packages")], min_length=1)
    """Where records come from."""
    prepared: PathStr | None = None
    """Use this prepared data set instead of preparing one, for example the output of `tep mine`. It must come from
    the same sources. Relative to storage.root."""
    max_bad_fraction: Share = 0.05
    """Stop if a larger share of a source's records cannot be read (broken lines, missing fields, bad bytes). A file
    that cannot be read to its end counts by its share of the source's files or bytes. 1 accepts every loss."""
    min_chars: int = Field(10, ge=1)
    """Records with a shorter field, in characters, are rejected: 10 drops docstrings such as "See base." (ours)."""
    max_chars: int = Field(1_000_000, ge=1)
    """Records with a longer field, in characters, are rejected."""
    max_nonprintable: Share = 0.1
    """Records with a field that has a larger share of control and replacement characters, after repair, are rejected
    (ours: binary is > 0.3)."""
    sanitize: Sanitize = Sanitize()
    """How texts are normalised."""
    safety: Safety = Safety()
    """What to do with suspicious patterns and personal data."""
    quality: Quality = Quality()
    """Which texts are kept."""
    near_duplicates: NearDuplicates = NearDuplicates()
    """Removal of near-duplicates, across all sources."""
    max_removed_fraction: Share = 1.0
    """Stop if exact and near-duplicates make up a larger share of the records that passed the rules."""
    decontaminate: list[PathStr] = []
    """BEIR folders: records that are duplicates or near-duplicates of their documents or queries are removed; so are
    records with such a negative. The folders' texts are sanitized and redacted like the records."""
    decontaminate_threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity from which a record is a near-duplicate of an evaluation text."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of records held out, chosen by the hash of their id. On small data, where that is fewer than two records,
    a tenth of them, two or more."""
    augment: Augment = Augment()
    """Augmentation of training anchors, the same in every run."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the row order and of augmentation."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources with distinct names, not {', '.join(names)}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("sources that all have a `weight`, or none")
        return self

    def prompt(self, *fields: TextField) -> str:
        """The prompt that all sources share, each taking its first of `fields` that has one; "" if they differ."""
        prompts = {next((s.prompts[name] for name in fields if name in s.prompts), "") for s in self.sources}
        return prompts.pop() if len(prompts) == 1 else ""


class Tokenizer(Section):
    load_path: PathStr | None = None
    """A tokenizer.json, or a pretrained tokenizer's folder. By default a tokenizer is trained and stored with the
    data. Texts are cut to 20,000 characters if its patterns are not known to take linear time (SECURITY.md)."""
    type: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """Type of tokenizer to train. Only byte-level BPE trains deterministically (tokenizers 0.23)."""
    vocab_size: int = Field(16_000, ge=512, le=1_000_000)
    """Vocabulary size of a trained tokenizer."""
    lowercase: bool = True
    """Lower-case before tokenizing, which helps on small data (debian: +0.01 NDCG@10, ours)."""
    max_length: int = Field(128, ge=2, le=131_072)
    """Maximum tokens per text, including special tokens."""
    long_texts: Literal["truncate", "windows"] = "truncate"
    """What to do with longer texts. windows: cut them into rows of `max_length` tokens with their parent's id; for
    records with `text` only."""
    window_overlap: int = Field(16, ge=0)
    """Tokens shared by neighbouring windows."""
    train_mb: int = Field(64, ge=1)
    """Size of the sample that the tokenizer is trained on, in MB; records are sampled by hash."""

    @model_validator(mode="after")
    def _windows_advance(self) -> Tokenizer:
        if self.long_texts == "windows" and self.window_overlap >= self.max_length - 2:
            raise ValueError(
                f"a window_overlap below max_length - 2 = {self.max_length - 2}, not {self.window_overlap}"
            )
        return self
