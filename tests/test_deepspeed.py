"""DeepSpeed's JSON as keys of our own: files that people have, what is refused, and the arithmetic of batches."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, ConfigError, load
from pipeline.config.deepspeed import HEADER, Row
from pipeline.config.deepspeed_batch import batch_parts
from pipeline.config.deepspeed_keys import DEFAULTS, DIRECT, FIXED, KNOWN, NO_COUNTERPART, NOT_NEEDED
from pipeline.runtime.console import stop_logging, table
from pipeline.runtime.job import Result, run_job

FP16: dict[str, Any] = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
AUTO_OPTIMIZER = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
AUTO_BATCH: dict[str, Any] = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2e3,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ZERO_2: dict[str, Any] = {  # transformers' documentation, "DeepSpeed", ZeRO-2
    "fp16": FP16,
    "optimizer": AUTO_OPTIMIZER,
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    **AUTO_BATCH,
}
ZERO_3: dict[str, Any] = {  # the same, ZeRO-3
    "fp16": FP16,
    "bf16": {"enabled": "auto"},
    "optimizer": AUTO_OPTIMIZER,
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **AUTO_BATCH,
}
SPECIFIED: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "steps_per_print": 50,
    "optimizer": {
        "type": "Adam",
        "params": {
            "lr": 3e-5,
            "betas": [0.8, 0.999],
            "eps": 1e-6,
            "weight_decay": 3e-7,
            "adam_w_mode": True,
            "torch_adam": True,
        },
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": 500,
            "warmup_num_steps": 20,
            "warmup_min_ratio": 0,
            "cos_min_ratio": 0.1,
            "warmup_type": "linear",
        },
    },
    "gradient_clipping": 0.5,
    "prescale_gradients": False,
    "communication_data_type": "fp32",
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 1, "offload_param": None},
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False, "profile": False},
    "wandb": {"enabled": True, "project": "theses"},
    "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "a"},
    "csv_monitor": {"enabled": False},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are looked up from where a command is run."""
    monkeypatch.chdir(tmp_path)


def config_of(content: Any, *arguments: str, yaml_text: str = "") -> Config:
    Path("ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    own: dict[str, Any] = yaml.safe_load(yaml_text) or {}
    own.setdefault("training", {})["deepspeed_config"] = "ds.json"
    Path("c.yaml").write_text(yaml.safe_dump(own))
    return load("c.yaml", ["storage.root=.", *arguments], environ={})


def refusal(content: Any, *arguments: str, yaml_text: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(content, *arguments, yaml_text=yaml_text)
    return str(caught.value)


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


def changed(config: Config) -> dict[str, Any]:
    """Keys that are not at their defaults."""
    mine, default = config.dump(), Config().dump()
    keys = ((section, key) for section in mine if section != "storage" for key in mine[section])
    return {f"{s}.{k}": mine[s][k] for s, k in keys if mine[s][k] != default[s][k]}


def test_transformers_zero_2() -> None:
    config = config_of(ZERO_2)
    assert changed(config) == {
        "training.strategy": "fsdp",
        "training.schedule": "constant",
        "training.log_every_steps": 2000,
    }
    rows = {row.key: row for row in config.deepspeed}
    assert rows["optimizer.params.lr"] == Row(
        "optimizer.params.lr", "auto", "", "training.learning_rate stays as it is"
    )
    assert "at any stage" in rows["zero_optimization.stage"].note
    assert rows["zero_optimization.overlap_comm"].note.startswith("not needed")
    assert "log" in rows["scheduler.params.warmup_type"].note


def test_transformers_zero_3() -> None:
    config = config_of(ZERO_3, yaml_text="training: {warmup_steps: 7, precision: bf16, global_batch_size: 128}")
    assert changed(config) == {
        "training.strategy": "fsdp",
        "training.final_rate_fraction": 0.0,
        "training.log_every_steps": 2000,
        "training.warmup_steps": 7,
        "training.precision": "bf16",
        "training.global_batch_size": 128,
    }


def test_a_specified_file() -> None:
    assert changed(config_of(SPECIFIED)) == {
        "training.global_batch_size": 64,
        "training.gradient_accumulation_steps": 8,
        "scaling.num_workers": 2,
        "training.log_every_steps": 50,
        "training.learning_rate": 3e-5,
        "training.betas": [0.8, 0.999],
        "training.adam_eps": 1e-6,
        "training.weight_decay": 3e-7,
        "training.schedule": "cosine",
        "training.max_steps": 500,
        "training.warmup_steps": 20,
        "training.final_rate_fraction": 0.1,
        "training.max_grad_norm": 0.5,
        "training.precision": "bf16",
        "training.strategy": "fsdp",
        "model.gradient_checkpointing": True,
        "logging.trackers": ["wandb", "tensorboard"],
        "logging.wandb_project": "theses",
    }


def test_the_table_has_every_key_of_the_file_in_its_order() -> None:
    rows = config_of(SPECIFIED).deepspeed
    in_file = [row.key for row in rows]
    assert in_file[:4] == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
    ]
    assert {"amp", "flops_profiler", "csv_monitor.enabled", "zero_optimization.offload_param"} <= set(in_file)
    assert rows[1] == Row("train_micro_batch_size_per_gpu", "4", "scaling.num_workers=2", "64 = 4 x 8 x 2 workers")
    printed = table(rows, HEADER)
    assert len(printed.splitlines()) == 2 + len(rows)
    assert "training.betas=[0.8, 0.999]" in printed


def test_yaml_yields_to_the_file_and_the_file_to_arguments() -> None:
    text = "training: {learning_rate: 1.0e-2, betas: [0.5, 0.5]}\nlogging: {trackers: [ray]}"
    file = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "wandb": {"enabled": True}}
    assert config_of(file, yaml_text=text).training.learning_rate == 1e-4
    assert config_of(file, yaml_text=text).logging.trackers == ["ray", "wandb"]
    assert config_of(file, yaml_text=text).training.betas == [0.5, 0.5]
    beaten = config_of(file, "training.learning_rate=2e-3", "logging.trackers=[]", yaml_text=text)
    assert (beaten.training.learning_rate, beaten.logging.trackers) == (2e-3, [])
    rows = {row.key: row for row in beaten.deepspeed}
    assert rows["optimizer.params.lr"].note == "the argument training.learning_rate beats it"
    assert rows["optimizer.params.lr"].became == ""


def test_deepspeeds_defaults_where_neither_file_says() -> None:
    config = config_of(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5000}},
        }
    )
    training = config.training
    assert (training.betas, training.adam_eps, training.weight_decay) == ([0.9, 0.999], 1e-8, 0.0)
    assert (training.warmup_steps, training.final_rate_fraction) == (1000, 1e-4)
    assert Row("optimizer.params.betas", "", "training.betas=[0.9, 0.999]", "DeepSpeed's default") in config.deepspeed


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({}, "auto"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "auto"),
    ],
)
def test_precision(file: dict[str, Any], expected: str) -> None:
    assert config_of(file).training.precision == expected


@pytest.mark.parametrize(("stage", "expected"), [(0, "ddp"), (1, "fsdp"), (2, "fsdp"), (3, "fsdp"), ("auto", "ddp")])
def test_stages(stage: object, expected: str) -> None:
    assert config_of({"zero_optimization": {"stage": stage}}).training.strategy == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}}, ("constant", 5, 0.01, None)),
        (
            {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0, "total_num_steps": 9, "warmup_min_lr": 0}},
            ("linear", 0, 1e-3, 9),
        ),
        ({"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": 9}}, ("cosine", 5, 1e-3, 9)),
    ],
)
def test_schedules(schedule: dict[str, Any], expected: tuple[Any, ...]) -> None:
    training = config_of({"scheduler": schedule}).training
    assert (training.schedule, training.warmup_steps, training.learning_rate, training.max_steps) == expected


@pytest.mark.parametrize(("kind", "expected"), [("fp32", "none"), ("fp16", "fp16"), ("bf16", "bf16"), (None, "none")])
def test_gradient_compression(kind: str | None, expected: str) -> None:
    assert config_of({"communication_data_type": kind}).training.gradient_compression == expected


REFUSED = [
    ("optimizer.type", "OneBitAdam", "AdamW or Adam"),
    ("optimizer.type", "Lamb", "AdamW or Adam"),
    ("scheduler.type", "OneCycle", "WarmupLR or WarmupDecayLR or WarmupCosineLR"),
    ("zero_optimization.stage", 4, "0 or 1 or 2 or 3"),
    ("zero_optimization.stage", True, "0 or 1 or 2 or 3"),
    ("zero_optimization", True, "a mapping of keys"),
    ("zero_optimization.offload_optimizer.device", "cpu", "nothing is offloaded"),
    ("zero_optimization.offload_optimizer.device", "nvme", "nothing is offloaded"),
    ("zero_optimization.offload_param.device", "cpu", "nothing is offloaded"),
    ("zero_optimization.cpu_offload", True, "nothing is offloaded"),
    ("zero_optimization.zero_quantized_weights", True, "ZeRO++"),
    ("zero_optimization.zero_quantized_gradients", True, "ZeRO++"),
    ("zero_optimization.zero_hpz_partition_size", 8, "ZeRO++"),
    ("zero_optimization.mics_shard_size", 8, "MiCS"),
    ("zero_optimization.overlap_com", True, "did you mean zero_optimization.overlap_comm?"),
    ("fp16.enabled", "yes", "true or false or auto"),
    ("fp16.loss_scale", 128, "dynamic"),
    ("fp16", True, "a mapping of keys"),
    ("bf16.bf16_master_weights_and_grads", True, "fp32"),
    ("data_types.grad_accum_dtype", "bf16", "fp32"),
    ("communication_data_type", "int8", "fp32 or fp16 or bf16"),
    ("gradient_allreduce_op", "sum", "averaged"),
    ("activation_checkpointing.cpu_checkpointing", True, "nothing is offloaded"),
    ("wandb.enabled", 1, "true or false or auto"),
    ("wandb.team", "us", "WANDB_ENTITY"),
    ("train_batch_size", 0, "a whole number from 1 on"),
    ("train_batch_size", 1.5, "a whole number from 1 on"),
    ("gradient_accumulation_steps", True, "a whole number from 1 on"),
    ("train_micro_batch_size_per_gpu", "4", "a whole number from 1 on"),
    ("sparse_gradients", True, "dense"),
    ("no_such_key", 1, "no counterpart"),
    ("no_such_block.key", 1, "no counterpart"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), REFUSED, ids=[f"{key}={value}" for key, value, _ in REFUSED])
def test_what_has_no_counterpart_is_refused_by_name(key: str, value: object, allowed: str) -> None:
    sentence = refusal(nested(key, value))
    assert sentence.startswith(f"ds.json: {key}: ")
    assert allowed in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("key", sorted(NO_COUNTERPART))
def test_features_may_only_be_off(key: str) -> None:
    for off in ({"enabled": False}, {"enabled": "auto"}, None, {}, False):
        assert changed(config_of(nested(key, off))) == {}
    for on in ({"enabled": True}, {"some": "thing"}, True):
        assert "no counterpart" in refusal(nested(key, on))


@pytest.mark.parametrize(("name", "as_here"), [("adam_w_mode", True), ("bias_correction", True), ("amsgrad", False)])
def test_switches_of_adam(name: str, as_here: bool) -> None:
    for value in (as_here, "auto"):
        rows = config_of({"optimizer": {"type": "Adam", "params": {name: value}}}).deepspeed
        assert next(row.note for row in rows if row.key == f"optimizer.params.{name}").startswith("as here")
    assert f"optimizer.params.{name}: found" in refusal({"optimizer": {"type": "Adam", "params": {name: not as_here}}})


@pytest.mark.parametrize(("name", "value"), [("warmup_min_lr", 1e-8), ("warmup_type", "log")])
def test_warm_ups_that_ours_is_not(name: str, value: object) -> None:
    sentence = refusal({"scheduler": {"type": "WarmupLR", "params": {name: value}}})
    assert sentence.startswith(f"ds.json: scheduler.params.{name}: found")


def test_contradictions_of_two_keys() -> None:
    assert "bf16.enabled: found True (a truth value); allowed is false, as fp16.enabled is true" in refusal(
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    )
    rates = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}},
    }
    assert "warmup_max_lr: found 0.001; allowed is auto or optimizer.params.lr, 0.0001" in refusal(rates)
    assert "optimizer.type: found no such key" in refusal({"optimizer": {"params": {"lr": 1e-4}}})


def test_a_value_out_of_our_range_names_both_files() -> None:
    rate = {"optimizer": {"type": "AdamW", "params": {"lr": 11}}}
    assert refusal(rate).startswith("ds.json (optimizer.params.lr): training.learning_rate: found 11")
    assert refusal({"gradient_clipping": 0}).startswith("ds.json (gradient_clipping): training.max_grad_norm: found 0")
    assert refusal({"train_batch_size": 1}).startswith("ds.json (train_batch_size): training.global_batch_size")
    assert refusal({}, yaml_text="training: {learning_rate: 11}").startswith("c.yaml: training.learning_rate")
    both = {"communication_data_type": "fp16", "zero_optimization": {"stage": 2}}
    assert refusal(both).startswith("c.yaml with ds.json: training: ")
    assert refusal(rate, "training.learning_rate=12").startswith("argument training.learning_rate: found 12")


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("", "not JSON"),
        ('{"fp16": ', "not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ("[1]", "found [1] (a list)"),
        ("null", "found null"),
    ],
)
def test_a_file_that_is_no_json_object(content: str, mentions: str) -> None:
    sentence = refusal(content)
    assert sentence.startswith("ds.json: ")
    assert mentions in sentence


def test_a_file_that_is_not_there_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config, args: object) -> Result:
        raise AssertionError("a wrong config came through")

    stop_logging()  # whatever another test left there
    Path("c.yaml").write_text("training: {deepspeed_config: nowhere/ds.json}\n")
    assert run_job("train", "", main, argv=["--config", "c.yaml"]) == 2
    assert "nowhere/ds.json: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["model: null", "training: null", "logging: [1]", "scaling: 3"])
def test_wrong_sections_are_left_to_validation(text: str) -> None:
    Path("ds.json").write_text(json.dumps(SPECIFIED))
    Path("c.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=rf"c\.yaml: {text.split(':')[0]}"):
        load("c.yaml", [] if "training" in text else ["training.deepspeed_config=ds.json"], environ={})


@pytest.mark.parametrize("name", ["3", "''", "$NO_SUCH_VARIABLE_1/ds.json"])
def test_a_name_that_is_none_is_left_to_validation(name: str) -> None:
    Path("c.yaml").write_text(f"training: {{deepspeed_config: {name}}}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: training\.deepspeed_config"):
        load("c.yaml", environ={})


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ((64, None, None), "", (64, 1, "auto")),
        ((64, None, 4), "", (64, 4, "auto")),
        (("auto", "auto", "auto"), "training: {gradient_accumulation_steps: 2}", (256, 2, "auto")),
        ((None, 4, None), "scaling: {num_workers: 2}", (8, 1, 2)),
        (("auto", 4, 8), "scaling: {num_workers: 2}", (64, 8, 2)),
        (("auto", 4, "auto"), "scaling: {num_workers: 2}\ntraining: {gradient_accumulation_steps: 3}", (24, 3, 2)),
        ((64, 4, None), "scaling: {num_workers: 2}", (64, 8, 2)),
        ((64, 4, 8), "", (64, 8, 2)),
        ((64, 4, "auto"), "training: {gradient_accumulation_steps: 8}", (64, 8, 2)),
        ((64, 4, 8), "scaling: {num_workers: [1, 2]}", (64, 8, [1, 2])),
        ((64.0, 4, 16), "", (64, 16, 1)),
    ],
)
def test_batch_arithmetic(file: tuple[Any, Any, Any], text: str, expected: tuple[int, int, Any]) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = config_of({k: v for k, v in zip(keys, file, strict=True) if v is not None}, yaml_text=text)
    training = config.training
    found = (training.global_batch_size, training.gradient_accumulation_steps, config.scaling.num_workers)
    assert found == expected


@pytest.mark.parametrize(
    ("file", "text", "mentions"),
    [
        ((64, 4, 8), "scaling: {num_workers: 3}", "train_batch_size: found 64, which is not 4 x 8 x 3 workers"),
        ((64, 4, 8), "scaling: {num_workers: [3, 4]}", "found 64, which is not 4 x 8 x 3 to 4 workers"),
        ((64, 4, 3), "", "found 64, which is not 4 x 3 x any number of workers"),
        ((4, 4, 8), "", "found 4, which is not 4 x 8 x any number of workers"),
        ((63, 4, None), "scaling: {num_workers: 2}", "found 63, which is not 4 x any number of steps x 2 workers"),
        ((4, 4, None), "scaling: {num_workers: 2}", "found 4, which is not 4 x any number of steps x 2 workers"),
        ((64, 4, None), "", "train_micro_batch_size_per_gpu: found 4 while the number of workers is open"),
        ((None, 4, 8), "", "train_micro_batch_size_per_gpu: found 4 while the number of workers is open"),
        ((64, 4, None), "scaling: {num_workers: [1, 2]}", "found 4 while the number of workers is open"),
    ],
)
def test_batches_that_do_not_add_up(file: tuple[Any, Any, Any], text: str, mentions: str) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sentence = refusal({k: v for k, v in zip(keys, file, strict=True) if v is not None}, yaml_text=text)
    assert sentence.startswith("ds.json: ")
    assert mentions in sentence


def test_an_argument_takes_the_place_of_a_part_of_the_batch() -> None:
    file = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}
    larger = config_of(file, "training.global_batch_size=128")
    assert (larger.training.global_batch_size, larger.training.gradient_accumulation_steps) == (128, 8)
    assert larger.scaling.num_workers == "auto"
    fewer = config_of(file, "training.gradient_accumulation_steps=2")
    assert (fewer.training.global_batch_size, fewer.training.gradient_accumulation_steps) == (64, 2)
    assert "64, which is not 4 x 8 x 4 workers" in refusal(file, "scaling.num_workers=4")


def test_batch_parts_against_brute_force() -> None:
    """Whatever is left out of a true product is found again, where one number alone fits."""
    for micro, steps, workers in itertools.product(range(1, 6), repeat=3):
        batch, exact = micro * steps * workers, (workers, workers)
        assert batch_parts(batch, micro, steps, exact) == (batch, steps, None)
        assert batch_parts(batch, micro, None, exact) == (batch, steps, None)
        assert batch_parts(None, micro, steps, exact) == (batch, steps, None)
        assert batch_parts(batch, micro, steps, None) == (batch, steps, workers)
        assert batch_parts(batch, None, steps, None) == (batch, steps, None)


def test_the_resolved_config_needs_no_deepspeed_file() -> None:
    config = config_of(SPECIFIED, "training.learning_rate=2e-3")
    Path("resolved.yaml").write_text(yaml.safe_dump(config.dump()))
    Path("ds.json").unlink()
    assert load("resolved.yaml", environ={}).dump() == config.dump()
    assert config.dump()["training"]["learning_rate"] == 2e-3
    assert pickle.loads(pickle.dumps(config)).deepspeed == config.deepspeed


def test_without_a_file_there_is_no_table() -> None:
    Path("c.yaml").write_text("training: {}\n")
    assert load("c.yaml", environ={}).deepspeed == ()


def test_the_tables_of_keys_do_not_overlap() -> None:
    tables = [set(DIRECT), set(FIXED), set(NOT_NEEDED), set(NO_COUNTERPART)]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(tables, 2))
    assert all(key in DIRECT for defaults in DEFAULTS.values() for key in defaults)
    assert set().union(*tables) <= KNOWN
    for ours, _ in DIRECT.values():
        Config().get(ours)
