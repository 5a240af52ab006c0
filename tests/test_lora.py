"""LoRA on a tiny BERT: what trains, exact resume, merged weights against W + B A alpha / rank and peft's own merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Config, ConfigError, load
from pipeline.data.tokenizer import train_tokenizer
from pipeline.index.encoder import TextEncoder
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.hf_export import export_model
from pipeline.model.learner import Learner
from pipeline.model.lora import add_lora, is_adapter
from pipeline.model.packing import pack
from pipeline.model.pretrained import load_pretrained
from pipeline.training.assembly import build_learner, check_model, describe
from pipeline.training.checkpoints import TrainState, newest_valid
from pipeline.training.loop import Hooks, Run, build_run, train
from pipeline.training.prefetch import to_batch
from pipeline.training.saving import HEADS, consolidate, load_checkpoint, save_checkpoint
from pipeline.training.validation import Validation
from tests.gloo_workers import Result, run_workers
from tests.test_pretrained import RAGGED, batch_of, saved
from tests.test_training import HYBRID, rows, saver

RANK, ALPHA = 4, 12.0
OPTIONS = ["training.learning_rate=1e-2", "training.global_batch_size=8", "training.max_steps=12"]


def config_of(tmp_path: Path, *overrides: str, rank: int = 0) -> Config:
    file = tmp_path / f"{rank}.yaml"
    file.write_text("{}")
    model = f"model.pretrained={tmp_path / 'bert'}"
    lora = f"model.lora={{rank: {RANK}, alpha: {ALPHA}}}"
    return load(file, [f"storage.root={tmp_path}", model, lora, *OPTIONS, *overrides], environ={})


def learner_of(config: Config) -> Learner:
    torch.manual_seed(0)
    backbone = load_pretrained(str(config.model.pretrained))
    assert config.model.lora
    add_lora(backbone, config.model.lora.rank, config.model.lora.alpha, config.model.lora.targets)
    decoder = None
    if config.objective.needs_decoder:
        decoder = Decoder(DecoderShape(64, 32, 1, 2, 24, memory_width=32), backbone.token_table)
    special = Special(start=2, end=3, mask=4, kept=frozenset(range(5)), vocab_size=64)
    return Learner(EmbeddingModel(backbone), config.objective, special, decoder)


def run_of(config: Config, save: Any = lambda run, state, is_best: None, stop: int = 12) -> Run:
    validation = Validation(to_batch(next(rows(0, 1))), lambda ids: [str(each) for each in ids], generated_texts=2)
    hooks = Hooks(save, lambda metrics: None)
    return build_run(config, learner_of(config), lambda a, b: rows(a, min(b, stop)), validation, 12, hooks)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return saved(tmp_path / "bert", "bert", vocab_size=64, **dropout)


@pytest.mark.usefixtures("bert")
def test_only_adapters_and_heads_train(tmp_path: Path) -> None:
    run = run_of(config_of(tmp_path, *HYBRID))
    before = copy.deepcopy(run.learner.state_dict())
    train(run, TrainState())
    changed = {name for name, tensor in run.learner.state_dict().items() if not torch.equal(tensor, before[name])}
    backbone = {name for name in before if name.startswith("model.")}
    assert changed & backbone == {name for name in backbone if is_adapter(name)}
    assert len(changed & backbone) == 2 * 6 * 2  # A and B of six linear layers in each of two layers
    heads = {name.partition(".")[0] for name in changed - backbone}
    assert heads == {"decoder", "masked_head", "log_scale"}
    assert {name for name, each in run.learner.named_parameters() if each.grad is not None} <= changed


@pytest.mark.parametrize(("killed_at", "options"), [(4, []), (7, HYBRID)])
@pytest.mark.usefixtures("bert")
def test_resumed_weights_are_bit_identical(killed_at: int, options: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, "checkpointing.every_steps=3", *options)
    whole = run_of(config, saver(tmp_path / "whole"))
    train(whole, TrainState())
    train(run_of(config, saver(tmp_path / "killed"), stop=killed_at), TrainState())
    point = newest_valid(tmp_path / "killed")
    assert point.folder is not None
    resumed = run_of(config)
    load_checkpoint(point.folder, resumed)
    assert train(resumed, point.state).step == 12
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(tensor, resumed.learner.state_dict()[name]), name


@pytest.fixture
def trained(bert: Path, tmp_path: Path) -> tuple[Run, Path]:
    """A trained run and its last checkpoint, with a tokenizer."""
    run = run_of(config_of(tmp_path, "tokenizer.max_length=32"))
    state = train(run, TrainState())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizer = train_tokenizer(["some words of some texts"] * 4, kind="wordpiece", vocab_size=60, lowercase=True)
    save_checkpoint(folder, run, state, tokenizer.to_str())
    return run, folder


def test_checkpoints_and_exports_have_adapters_merged(trained: tuple[Run, Path], bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run, folder = trained
    model, factors, base = (
        load_file(folder / "model.safetensors"),
        load_file(folder / HEADS),
        load_file(bert / "model.safetensors"),
    )
    linear = {name.partition(".lora_A.")[0] for name in factors if ".lora_A." in name}
    assert len(linear) == 12
    for layer in linear:
        down, up = (factors[f"{layer}.lora_{each}.default.weight"] for each in "AB")
        short = layer.removeprefix("model.backbone.model.")
        expected = base[f"{short}.weight"] + up @ down * (ALPHA / RANK)
        assert not torch.equal(expected, base[f"{short}.weight"])
        torch.testing.assert_close(model[f"model.{short}.weight"], expected)
    assert not any("lora" in name or "base_layer" in name for name in model)

    (tmp_path / "export").mkdir()
    export_model(folder, tmp_path / "export")
    encoder, texts = TextEncoder(folder, device="cpu"), ["some words", "texts", "of some texts some words"]
    ids = [encoder.tokenizer.encode(text).ids for text in texts]
    with torch.inference_mode():
        adapted = run.learner.eval().encode(pack(ids)).numpy()
    for vectors in (encoder.encode(texts), SentenceTransformer(str(tmp_path / "export"), device="cpu").encode(texts)):
        torch.testing.assert_close(torch.from_numpy(vectors), torch.from_numpy(adapted), atol=1e-5, rtol=1e-5)


def test_merged_weights_equal_those_of_peft(trained: tuple[Run, Path], bert: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run, folder = trained
    theirs = get_peft_model(
        load_pretrained(bert).model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )  # type: ignore[arg-type]
    prefix = "model.backbone.model."
    state = {
        f"base_model.model.{name.removeprefix(prefix)}": each
        for name, each in run.learner.state_dict().items()
        if name.startswith(prefix)
    }
    theirs.load_state_dict(state)
    merged, ours = theirs.merge_and_unload().state_dict(), load_file(folder / "model.safetensors")
    assert len(merged) == len(ours)
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[f"model.{name}"], tensor, atol=1e-6, rtol=1e-6)


def test_the_states_do_not_change_before_training(bert: Path) -> None:
    batch, plain = batch_of(*RAGGED), EmbeddingModel(load_pretrained(bert))
    adapted = EmbeddingModel(load_pretrained(bert))
    add_lora(adapted.backbone, RANK, ALPHA, None)
    torch.testing.assert_close(adapted.eval()(batch), plain(batch))


def test_another_base_is_refused(trained: tuple[Run, Path], bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] += 1
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.pretrained: its model\.embeddings.* not what the run began with"):
        load_checkpoint(trained[1], run_of(config_of(tmp_path)))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            "[query, q_proj]",
            r"model\.lora\.targets: found q_proj; the model's linear layers are dense, key, query, value",
        ),
        ("[]", r"model\.lora\.targets: found no target"),
        ("[uery]", r"model\.lora\.targets: found uery"),
    ],
)
@pytest.mark.usefixtures("bert")
def test_targets_that_match_nothing(targets: str, words: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words"] * 4, kind="wordpiece", vocab_size=60, lowercase=True)
    config = config_of(tmp_path, f"model.lora.targets={targets}", "tokenizer.max_length=32")
    with pytest.raises(ConfigError, match=words) as refusal:
        check_model(config, tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("bert")
def test_a_learner_with_targets(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words"] * 4, kind="wordpiece", vocab_size=60, lowercase=True)
    config = config_of(tmp_path, "model.lora.targets=[query, attention.output.dense]", "tokenizer.max_length=32")
    check_model(config, tokenizer)
    learner = build_learner(config, tokenizer, negatives=False)
    trained = {name for name, each in learner.named_parameters() if each.requires_grad}
    assert {name.partition(".lora_")[0].rpartition(".layer.")[2][2:] for name in trained} == {
        "attention.self.query",
        "attention.output.dense",
    }
    count = 2 * 2 * 2 * RANK * 32  # layers, targets, A and B
    assert f"; {count:,} of them are trained" in describe(learner)


def test_lora_needs_a_pretrained_model(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {lora: {rank: 4}}")
    with pytest.raises(ConfigError, match="lora only with pretrained"):
        load(tmp_path / "c.yaml", [], environ={})


def test_an_adapters_folder_is_refused(bert: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="found an adapter of peft; merge it into its base"):
        load_pretrained(bert)


def _trained_by_two(rank: int, world_size: int, folder: str, strategy: str) -> Result:
    path = Path(folder)
    config = config_of(path, f"training.strategy={strategy}", f"storage.root={folder}/{strategy}", rank=rank)
    share = slice(0, 4) if rank == 0 else slice(4, 8)
    run = run_of(config)
    run.batches = lambda start, stop: (table.slice(share.start, 4) for table in rows(start, stop))
    state = train(run, TrainState())
    target = path / strategy / "saved"
    target.mkdir(parents=True, exist_ok=True)
    if strategy == "fsdp" or rank == 0:
        save_checkpoint(target, run, state, "{}")
    again = run_of(config)
    if strategy == "fsdp":
        load_checkpoint(target, again)
        for (name, old), (_, new) in zip(run.learner.named_parameters(), again.learner.named_parameters(), strict=True):
            assert torch.equal(old.to_local(), new.to_local()), name  # type: ignore[attr-defined]
    return {}


def test_two_workers(tmp_path: Path) -> None:
    """ddp and fsdp give the same model, and fsdp's shards are loaded again and merged."""
    saved(tmp_path / "bert", "bert", vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for strategy in ("ddp", "fsdp"):
        run_workers(2, _trained_by_two, str(tmp_path), strategy)
    consolidate(tmp_path / "fsdp" / "saved")
    ddp, fsdp = (load_file(tmp_path / strategy / "saved" / "model.safetensors") for strategy in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    base = load_file(tmp_path / "bert" / "model.safetensors")
    query = "encoder.layer.0.attention.self.query.weight"
    assert not torch.allclose(ddp[f"model.{query}"], base[query], atol=1e-3)
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp[name], tensor, atol=1e-4, rtol=1e-4)
