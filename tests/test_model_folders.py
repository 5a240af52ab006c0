"""Model folders of strangers: whatever the files hold, the answer is a model or one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import BertConfig, BertModel

from pipeline.config import ConfigError
from pipeline.data.tokenizer import train_tokenizer
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, Projection, load_model, read_model_spec, save_model
from pipeline.model.transformer import Encoder, EncoderShape

WIDTH, HUGE = 8, 10**12
LARGEST_TENSOR_BYTES = 64 << 20
"""The folders here have less than 100 kB."""
JSON_FILES = {
    "ours": ("model.json", "tokenizer.json"),
    "theirs": (
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
        "tokenizer.json",
    ),
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`: a model as `save_model` writes it. `theirs`: one in the layout of sentence-transformers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("folders")
    tokenizer = train_tokenizer(["some words of a text"] * 9, kind="wordpiece", vocab_size=60, lowercase=False)
    ours, theirs, size = root / "ours", root / "theirs", tokenizer.get_vocab_size()
    for folder in (ours, theirs, theirs / "2_Dense"):
        folder.mkdir()
    encoder = Encoder(EncoderShape(size, WIDTH, num_layers=1, num_heads=2, d_ff=12))
    head = Head("mean", prompts=(("query", "find: "),), projections=(Projection(4),))
    save_model(ours, EmbeddingModel(encoder, head), tokenizer.to_str(), max_length=16)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=20, **shape)).save_pretrained(theirs)
    tokenizer.save(str(theirs / "tokenizer.json"))
    names = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(names)
    ]
    write(theirs / "modules.json", modules)
    write(theirs / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True})
    dense = {"in_features": WIDTH, "out_features": 4, "bias": True, "activation_function": "torch.nn.Tanh"}
    write(theirs / "2_Dense" / "config.json", dense)
    save_tensors(theirs / "2_Dense" / "model.safetensors", {"linear.weight": (4, WIDTH), "linear.bias": (4,)})
    write(theirs / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    write(theirs / "config_sentence_transformers.json", {"prompts": {"query": "find: "}})
    write(theirs / "tokenizer_config.json", {"model_max_length": 20, "truncation_side": "right"})
    return root


def save_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


def changed(file: str, *keys: Any, to: Any) -> Callable[[Path], None]:
    """Replace the value at a path of keys in a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        write(folder / file, content)

    return change


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda folder: (folder / "model.safetensors").write_bytes(content) and None


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "cut in its header": lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 50) + b"{"),
    "header of 2^60 bytes": safetensors({}, length=1 << 60),
    "header that is no JSON": safetensors(b"{]"),
    "header that is a list": safetensors([]),
    "deep header": safetensors(b"[" * 100_000),
    "a huge tensor": safetensors({"a": tensor([HUGE, HUGE], 0, 16)}),
    "a tensor of 2^66 numbers": safetensors({"a": tensor([1 << 33, 1 << 33], 0, 16)}),
    "overlap": safetensors({"a": tensor([4], 0, 16), "b": tensor([2], 0, 8)}),
    "gap": safetensors({"a": tensor([2], 8, 16)}),
    "negative": safetensors({"a": tensor([4], -16, 0)}),
    "backwards": safetensors({"a": tensor([4], 16, 0)}),
    "behind the end": safetensors({"a": tensor([8], 0, 32)}),
    "unknown type": safetensors({"a": tensor([4], 0, 16, "F33")}),
    "cut in its data": safetensors({"a": tensor([4], 0, 16)}, bytes(15)),
}


def refusal(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises((OSError, ValueError, ConfigError)) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", JSON_FILES)
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_are_one_sentence(
    damage: Callable[[Path], Any], kind: str, folders: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    damage(folder)
    assert "model.safetensors: cannot read it (" in refusal(folder)


WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    ("theirs", changed("config.json", "max_position_embeddings", to=1 << 63), "supported; give"),
    ("theirs", changed("config.json", "max_position_embeddings", to=HUGE), "at most 16,777,216 positions are"),
    ("theirs", changed("config.json", "max_position_embeddings", to=1 << 23), "its config describes 83,"),
    ("theirs", changed("config.json", "vocab_size", to=1 << 63), "does not describe a bert model"),
    ("theirs", changed("config.json", "vocab_size", to=HUGE), "its config describes 8,000,000,"),
    ("theirs", changed("config.json", "num_hidden_layers", to=10_000), "found num_hidden_layers 10,000"),
    ("theirs", changed("config.json", "model_type", to=["bert"]), "found model_type ['bert'], which"),
    ("theirs", changed("config.json", "hidden_size", to=0), "does not describe a bert model"),
    ("theirs", lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON (maximum recursion"),
    ("theirs", changed("modules.json", 1, "path", to="\ud800"), "modules.json: found no list of modules"),
    ("theirs", changed("modules.json", 1, "path", to="a\0"), "modules.json: found no list of modules"),
    ("theirs", changed("modules.json", 1, to=[]), "modules.json: found no list of modules"),
    ("theirs", changed("2_Dense/config.json", "out_features", to=HUGE), "found 1000000000000 as out_features"),
    ("theirs", changed("2_Dense/config.json", "out_features", to=1 << 30), "2_Dense: its safetensors do not fit"),
    ("theirs", changed("1_Pooling/config.json", "pooling_mode", to=[["mean"]]), "found pooling by ['mean']"),
    ("theirs", changed("1_Pooling/config.json", "pooling_mode", to=7), "found pooling by 7"),
    ("theirs", changed("config_sentence_transformers.json", "prompts", to=["a"]), "found prompts that are no mapping"),
    ("theirs", changed("tokenizer_config.json", "truncation_side", to="up"), "found truncation_side 'up'"),
    ("ours", changed("model.json", "shape", "vocab_size", to=HUGE), "model.json does not fit model.safetensors"),
    ("ours", changed("model.json", "shape", "vocab_size", to=1 << 63), "model.json does not fit model.safetensors"),
    ("ours", changed("model.json", "shape", "d_ff", to=HUGE), "model.json does not fit model.safetensors"),
    ("ours", changed("model.json", "shape", "num_layers", to=HUGE), "found num_layers 1,000,000,000,000, but 1"),
    ("ours", changed("model.json", "shape", "num_heads", to=0), "model.json does not fit model.safetensors"),
    ("ours", changed("model.json", "shape", "depth", to=1), "model.json does not fit model.safetensors"),
    ("ours", changed("model.json", "shape", to={}), "model.json does not describe a model"),
    ("ours", changed("model.json", "max_length", to=-1), "model.json does not describe a model"),
    ("ours", changed("model.json", "max_length", to=1 << 63), "model.json does not describe a model"),
    ("ours", changed("model.json", "width", to=5), "found width 5, but the model's is 4"),
    ("ours", changed("model.json", "head", "pooling", to="median"), "model.json does not describe a model"),
    ("ours", changed("model.json", "head", "projections", 0, "width", to=1 << 30), "does not fit model.safetensors"),
    ("ours", changed("model.json", "head", "projections", 0, "activation", to="Module"), "does not describe a model"),
    ("ours", lambda f: (f / "model.json").write_text("[" * 100_000), "model.json does not describe a model"),
]


@pytest.mark.parametrize(
    ("kind", "change", "words"), WRONG, ids=[f"{i}-{words[:24]}" for i, (*_, words) in enumerate(WRONG)]
)
def test_wrong_values_are_one_sentence(
    kind: str, change: Callable[[Path], Any], words: str, folders: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    change(folder)
    assert words in refusal(folder)


def static(folder: Path, source: Path, **tensors: torch.Tensor) -> Path:
    """A folder of model2vec."""
    from safetensors.torch import save_file

    folder.mkdir()
    write(folder / "config.json", {"model_type": "model2vec"})
    shutil.copy(source / "tokenizer.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_token_tables_whose_tensors_do_not_fit_are_one_sentence(folders: Path, tmp_path: Path) -> None:
    table, mapping = torch.ones(3, 4), torch.zeros(60, dtype=torch.uint8)
    assert load_model(static(tmp_path / "right", folders / "theirs", embeddings=table, mapping=mapping))[0].width == 4
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"embeddings": torch.empty(0, HUGE)}, "found no table"),
        ({"embeddings": table, "mapping": mapping + 3}, "found a mapping or weights that do not fit"),
        ({"embeddings": table, "mapping": torch.full((60,), -1)}, "found a mapping or weights that do not fit"),
        ({"embeddings": table, "mapping": mapping[None]}, "found a mapping or weights that do not fit"),
        ({"embeddings": table, "mapping": mapping, "weights": torch.ones(3)}, "found a mapping or weights that do"),
        ({"embeddings": table, "mapping": torch.zeros(3001, dtype=torch.uint8)}, "a mapping of 3,001 tokens to 3 rows"),
    ]
    for i, (tensors, words) in enumerate(wrong):
        assert words in refusal(static(tmp_path / str(i), folders / "theirs", **tensors))


# Values that a hostile file would try in the place of another.
numbers = st.sampled_from([0, 1, -1, 7, 1000, 1 << 23, 1 << 31, HUGE, 1 << 63, 1 << 80, 0.5, 1e300, float("nan")])
texts = st.sampled_from(
    ["", "\ud800", "a\0b", "..", "/etc", "x" * 300, "relative_key", "bert", "Dense", "[UNK]", "((a+)+)+$"]
)
values = numbers | texts | st.sampled_from([None, True, False, [], {}, [[]], {"": {}}, ["a"], [1, 2], {"a": 1}])


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the largest tensor that is made outside the meta device."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of keys to all values of a JSON document, at most 8 of a list."""
    if not isinstance(content, dict | list):
        return [path]
    items = [*content.items()] if isinstance(content, dict) else [*enumerate(content)][:8]
    return [path, *(found for key, value in items for found in places(value, (*path, key)))]


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_folders_give_a_model_or_one_sentence(data: st.DataObject, folders: Path, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from([*JSON_FILES]))
    folder = shutil.copytree(folders / kind, tmp_path / "mutated", dirs_exist_ok=True)
    if data.draw(st.booleans()):
        for file in data.draw(st.lists(st.sampled_from(JSON_FILES[kind]), min_size=1, max_size=2, unique=True)):
            content = {"": json.loads((folder / file).read_text())}
            for _ in range(data.draw(st.integers(1, 2))):
                found = data.draw(st.sampled_from(places(content)[1:]))
                *outer, last = found
                inner: Any = content
                for key in outer:
                    inner = inner[key]
                inner[last] = data.draw(values)
            write(folder / file, content[""])
    else:
        file = "model.safetensors"
        raw = bytearray((folder / file).read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little")
        for at in data.draw(st.lists(st.integers(0, header), min_size=1, max_size=4)):
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        (folder / file).write_bytes(raw)
    for read in (read_model_spec, load_model):
        with Largest() as largest:
            try:
                read(folder)
            except (OSError, ValueError, ConfigError):
                continue
            finally:
                assert largest.bytes < LARGEST_TENSOR_BYTES
