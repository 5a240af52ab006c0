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
from pipeline.config.reading import assign
from pipeline.runtime.console import table

ZERO_2 = """{
  "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
           "min_loss_scale": 1},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "scheduler": {"type": "WarmupLR",
                "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
  "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": true},
                        "allgather_partitions": true, "allgather_bucket_size": 5e8, "overlap_comm": true,
                        "reduce_scatter": true, "reduce_bucket_size": 5e8, "contiguous_gradients": true,
                        "round_robin_gradients": true},
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2e3,
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
}"""  # from transformers' documentation, "DeepSpeed", ZeRO-2
ZERO_3 = """{
  "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
           "min_loss_scale": 1},
  "bf16": {"enabled": "auto"},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": "auto",
                                                    "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
  "zero_optimization": {"stage": 3, "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 1e9,
                        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
                        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": true},
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2e3,
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
}"""  # the same page, ZeRO-3
SPECIFIED = """{
  "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "steps_per_print": 50,
  "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-6, "weight_decay": 3e-7,
                                           "adam_w_mode": true, "torch_adam": true}},
  "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 500, "warmup_num_steps": 20,
                                                     "warmup_min_ratio": 0, "cos_min_ratio": 0.1,
                                                     "warmup_type": "linear"}},
  "gradient_clipping": 0.5, "prescale_gradients": false, "communication_data_type": "fp32",
  "bf16": {"enabled": true}, "fp16": {"enabled": false}, "zero_optimization": {"stage": 1, "offload_param": null},
  "activation_checkpointing": {"partition_activations": true, "cpu_checkpointing": false, "profile": false},
  "wandb": {"enabled": true, "project": "theses"},
  "tensorboard": {"enabled": true, "output_path": "logs", "job_name": "a"},
  "csv_monitor": {"enabled": false}, "flops_profiler": {"enabled": false, "profile_step": 1},
  "amp": {"enabled": "auto", "opt_level": "auto"}, "data_types": {"grad_accum_dtype": "fp32"}
}"""
WORKERS_2 = "scaling: {num_workers: 2}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are looked up from where a command is run."""
    monkeypatch.chdir(tmp_path)


def config_of(content: str | dict[str, Any], *arguments: str, yaml_text: str = "") -> Config:
    """The config of a DeepSpeed file: its text, or its values by dotted keys."""
    if not isinstance(content, str):
        tree: dict[str, Any] = {}
        for key, value in content.items():
            assign(tree, key.split("."), value, "")
        content = json.dumps(tree)
    Path("ds.json").write_text(content)
    own: dict[str, Any] = yaml.safe_load(yaml_text) or {}
    own.setdefault("training", {})["deepspeed_config"] = "ds.json"
    Path("c.yaml").write_text(yaml.safe_dump(own))
    return load("c.yaml", ["storage.root=.", *arguments], environ={})


def refusal(content: str | dict[str, Any], *arguments: str, yaml_text: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(content, *arguments, yaml_text=yaml_text)
    return str(caught.value)


def sizes(batch: Any, micro: Any, steps: Any) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: size for key, size in zip(keys, (batch, micro, steps), strict=True) if size is not None}


def changed(config: Config) -> dict[str, Any]:
    """Keys that are not at their defaults, by section."""
    mine, default = config.dump(), Config().dump()
    found = {
        section: {key: value for key, value in keys.items() if value != default[section][key]}
        for section, keys in mine.items()
        if section != "storage"
    }
    return {section: keys for section, keys in found.items() if keys}


def test_transformers_zero_2_and_3() -> None:
    config = config_of(ZERO_2)
    assert changed(config) == {"training": {"strategy": "fsdp", "schedule": "constant", "log_every_steps": 2000}}
    rows = {row.key: row for row in config.deepspeed}
    stays = Row("optimizer.params.lr", "auto", "", "training.learning_rate stays as it is")
    assert rows["optimizer.params.lr"] == stays
    assert "at any stage" in rows["zero_optimization.stage"].note
    assert rows["zero_optimization.overlap_comm"].note.startswith("not needed")
    assert "log" in rows["scheduler.params.warmup_type"].note
    own = {"warmup_steps": 7, "precision": "bf16", "global_batch_size": 128}
    third = config_of(ZERO_3, yaml_text=json.dumps({"training": own}))
    assert changed(third) == {
        "training": {"strategy": "fsdp", "final_rate_fraction": 0.0, "log_every_steps": 2000, **own}
    }


def test_a_file_that_leaves_nothing_open_and_its_table() -> None:
    config = config_of(SPECIFIED)
    assert changed(config) == yaml.safe_load("""
        scaling: {num_workers: 2}
        model: {gradient_checkpointing: true}
        logging: {trackers: [wandb, tensorboard], wandb_project: theses}
        training:
          {global_batch_size: 64, gradient_accumulation_steps: 8, log_every_steps: 50, max_steps: 500, strategy: fsdp,
           learning_rate: 3.0e-5, betas: [0.8, 0.999], adam_eps: 1.0e-6, weight_decay: 3.0e-7, max_grad_norm: 0.5,
           schedule: cosine, warmup_steps: 20, final_rate_fraction: 0.1, precision: bf16}
    """)
    rows, keys = config.deepspeed, [row.key for row in config.deepspeed]
    assert keys[:4] == [*sizes(64, 4, 8), "steps_per_print"]
    assert {"amp", "flops_profiler", "csv_monitor.enabled", "zero_optimization.offload_param"} <= set(keys)
    assert rows[1] == Row("train_micro_batch_size_per_gpu", "4", "scaling.num_workers=2", "64 = 4 x 8 x 2 workers")
    printed = table(rows, HEADER)
    assert len(printed.splitlines()) == 2 + len(rows)
    assert "training.betas=[0.8, 0.999]" in printed


def test_yaml_yields_to_the_file_and_the_file_to_arguments() -> None:
    text = "training: {learning_rate: 1.0e-2, betas: [0.5, 0.5]}\nlogging: {trackers: [ray]}"
    file = {"optimizer.type": "AdamW", "optimizer.params.lr": 1e-4, "wandb.enabled": True}
    config = config_of(file, yaml_text=text)
    assert (config.training.learning_rate, config.training.betas) == (1e-4, [0.5, 0.5])
    assert config.logging.trackers == ["ray", "wandb"]
    beaten = config_of(file, "training.learning_rate=2e-3", "logging.trackers=[]", yaml_text=text)
    assert (beaten.training.learning_rate, beaten.logging.trackers) == (2e-3, [])
    rows = {row.key: row for row in beaten.deepspeed}
    assert rows["optimizer.params.lr"].note == "the argument training.learning_rate beats it"
    assert rows["optimizer.params.lr"].became == ""


def test_deepspeeds_defaults_where_neither_file_says() -> None:
    schedule = {"scheduler.type": "WarmupCosineLR", "scheduler.params.total_num_steps": 5000}
    config = config_of({"optimizer.type": "AdamW", "optimizer.params.lr": 1e-4, **schedule})
    training = config.training
    assert (training.betas, training.adam_eps, training.weight_decay) == ([0.9, 0.999], 1e-8, 0.0)
    assert (training.warmup_steps, training.final_rate_fraction) == (1000, 1e-4)
    assert Row("optimizer.params.betas", "", "training.betas=[0.9, 0.999]", "DeepSpeed's default") in config.deepspeed


# key of ours → what it becomes, with the file that says so
BECOMES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "precision": [
        ("auto", {}),
        ("fp16", {"fp16.enabled": True}),
        ("bf16", {"bf16.enabled": True, "fp16.enabled": False}),
        ("bf16", {"bfloat16.enabled": True}),
        ("fp32", {"fp16.enabled": False}),
        ("fp32", {"fp16.enabled": False, "bf16.enabled": False}),
        ("auto", {"fp16.enabled": "auto", "bf16.enabled": False}),
    ],
    "strategy": [
        *(("ddp", {"zero_optimization.stage": stage}) for stage in (0, "auto")),
        *(("fsdp", {"zero_optimization.stage": stage}) for stage in (1, 2, 3)),
    ],
    "gradient_compression": [
        (found, {"communication_data_type": kind})
        for found, kind in (("none", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("none", None))
    ],
}


@pytest.mark.parametrize("key", BECOMES)
def test_what_a_key_becomes(key: str) -> None:
    for expected, file in BECOMES[key]:
        assert config_of(file).get(f"training.{key}") == expected, file


def test_schedules() -> None:
    for kind, parameters, expected in (
        ("WarmupLR", {"warmup_num_steps": 5, "warmup_max_lr": 0.01}, ("constant", 5, 0.01, None)),
        (
            "WarmupDecayLR",
            {"warmup_num_steps": 0, "total_num_steps": 9, "warmup_min_lr": 0},
            ("linear", 0, 1e-3, 9),
        ),
        ("WarmupCosineLR", {"warmup_num_steps": 5, "total_num_steps": 9}, ("cosine", 5, 1e-3, 9)),
    ):
        found = config_of({"scheduler": {"type": kind, "params": parameters}}).training
        assert (found.schedule, found.warmup_steps, found.learning_rate, found.max_steps) == expected


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


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    for key, value, allowed in REFUSED:
        sentence = refusal({key: value})
        assert sentence.startswith(f"ds.json: {key}: ")
        assert allowed in sentence, key
        assert "\n" not in sentence


def test_features_may_only_be_off() -> None:
    for off in ({"enabled": False}, {"enabled": "auto"}, None, {}, False):
        assert changed(config_of(dict.fromkeys(sorted(NO_COUNTERPART), off))) == {}
    for key in NO_COUNTERPART:
        assert f"{key}: found" in (sentence := refusal({key: {"enabled": True}}))
        assert "no counterpart" in sentence
    for on in ({"some": "thing"}, True):
        assert "no counterpart" in refusal({"amp": on})


def test_what_adam_and_a_warm_up_are_here_anyway() -> None:
    for name, as_here in (("adam_w_mode", True), ("bias_correction", True), ("amsgrad", False)):
        key = f"optimizer.params.{name}"
        for value in (as_here, "auto"):
            notes = {row.key: row.note for row in config_of({"optimizer.type": "Adam", key: value}).deepspeed}
            assert notes[key].startswith("as here")
        assert f"{key}: found" in refusal({"optimizer.type": "Adam", key: not as_here})
    for name, value in (("warmup_min_lr", 1e-8), ("warmup_type", "log")):
        sentence = refusal({"scheduler.type": "WarmupLR", f"scheduler.params.{name}": value})
        assert sentence.startswith(f"ds.json: scheduler.params.{name}: found")


def test_contradictions_of_two_keys() -> None:
    both = refusal({"fp16.enabled": True, "bf16.enabled": True})
    assert "bf16.enabled: found True (a truth value); allowed is false, as fp16.enabled is true" in both
    rate = {"optimizer.type": "AdamW", "optimizer.params.lr": 1e-4}
    peaks = refusal({**rate, "scheduler.type": "WarmupLR", "scheduler.params.warmup_max_lr": 1e-3})
    assert "warmup_max_lr: found 0.001; allowed is auto or optimizer.params.lr, 0.0001" in peaks
    assert "optimizer.type: found no such key" in refusal({"optimizer.params.lr": 1e-4})


def test_a_value_out_of_our_range_names_both_files() -> None:
    rate = {"optimizer.type": "AdamW", "optimizer.params.lr": 11}
    assert refusal(rate).startswith("ds.json (optimizer.params.lr): training.learning_rate: found 11")
    assert refusal({"gradient_clipping": 0}).startswith("ds.json (gradient_clipping): training.max_grad_norm: found 0")
    assert refusal({"train_batch_size": 1}).startswith("ds.json (train_batch_size): training.global_batch_size")
    assert refusal({}, yaml_text="training: {learning_rate: 11}").startswith("c.yaml: training.learning_rate")
    both = {"communication_data_type": "fp16", "zero_optimization.stage": 2}
    assert refusal(both).startswith("c.yaml with ds.json: training: ")
    assert refusal(rate, "training.learning_rate=12").startswith("argument training.learning_rate: found 12")


def test_a_file_that_is_no_json_object_or_not_there() -> None:
    for content, mentions in (
        ("", "not JSON"),
        ('{"fp16": ', "not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ("[1]", "found [1] (a list)"),
        ("null", "found null"),
    ):
        sentence = refusal(content)
        assert sentence.startswith("ds.json: ")
        assert mentions in sentence
    Path("c.yaml").write_text("training: {deepspeed_config: nowhere/ds.json}")
    with pytest.raises(ConfigError, match=r"^nowhere/ds\.json: No such file or directory"):
        load("c.yaml")


def test_wrong_sections_and_names_are_left_to_validation() -> None:
    Path("ds.json").write_text(SPECIFIED)
    for text, key in (
        ("model: null", "model"),
        ("training: null", "training"),
        ("logging: [1]", "logging"),
        ("scaling: 3", "scaling"),
        ("training: {deepspeed_config: 3}", "training.deepspeed_config"),
        ("training: {deepspeed_config: ''}", "training.deepspeed_config"),
        ("training: {deepspeed_config: $NO_SUCH_VARIABLE_1/ds.json}", "training.deepspeed_config"),
    ):
        Path("c.yaml").write_text(f"{text}\n")
        with pytest.raises(ConfigError, match=rf"c\.yaml: {key}"):
            load("c.yaml", [] if "training" in text else ["training.deepspeed_config=ds.json"], environ={})


def test_batch_arithmetic() -> None:
    """(Global batch, micro-batch, steps) of the file, and (global batch, steps, workers) of ours."""
    for file, text, expected in (
        ((64, None, None), "", (64, 1, "auto")),
        ((64, None, 4), "", (64, 4, "auto")),
        (("auto", "auto", "auto"), "training: {gradient_accumulation_steps: 2}", (256, 2, "auto")),
        ((None, 4, None), WORKERS_2, (8, 1, 2)),
        (("auto", 4, 8), WORKERS_2, (64, 8, 2)),
        (("auto", 4, "auto"), f"{WORKERS_2}\ntraining: {{gradient_accumulation_steps: 3}}", (24, 3, 2)),
        ((64, 4, None), WORKERS_2, (64, 8, 2)),
        ((64, 4, 8), "", (64, 8, 2)),
        ((64, 4, "auto"), "training: {gradient_accumulation_steps: 8}", (64, 8, 2)),
        ((64, 4, 8), "scaling: {num_workers: [1, 2]}", (64, 8, [1, 2])),
        ((64.0, 4, 16), "", (64, 16, 1)),
    ):
        config = config_of(sizes(*file), yaml_text=text)
        training, workers = config.training, config.scaling.num_workers
        found = (training.global_batch_size, training.gradient_accumulation_steps, workers)
        assert found == expected, (file, text)


def test_batches_that_do_not_add_up() -> None:
    open_number = "train_micro_batch_size_per_gpu: found 4 while the number of workers is open"
    for file, text, mentions in (
        ((64, 4, 8), "scaling: {num_workers: 3}", "train_batch_size: found 64, which is not 4 x 8 x 3 workers"),
        ((64, 4, 8), "scaling: {num_workers: [3, 4]}", "found 64, which is not 4 x 8 x 3 to 4 workers"),
        ((64, 4, 3), "", "found 64, which is not 4 x 3 x any number of workers"),
        ((4, 4, 8), "", "found 4, which is not 4 x 8 x any number of workers"),
        ((63, 4, None), WORKERS_2, "found 63, which is not 4 x any number of steps x 2 workers"),
        ((4, 4, None), WORKERS_2, "found 4, which is not 4 x any number of steps x 2 workers"),
        ((64, 4, None), "", open_number),
        ((None, 4, 8), "", open_number),
        ((64, 4, None), "scaling: {num_workers: [1, 2]}", open_number),
    ):
        sentence = refusal(sizes(*file), yaml_text=text)
        assert sentence.startswith("ds.json: ")
        assert mentions in sentence


def test_an_argument_takes_the_place_of_a_part_of_the_batch() -> None:
    file = sizes(64, 4, 8)
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
    resolved = load("resolved.yaml", environ={})
    assert resolved.dump() == config.dump()
    assert resolved.deepspeed == ()  # there is no table without a file
    assert config.dump()["training"]["learning_rate"] == 2e-3
    assert pickle.loads(pickle.dumps(config)).deepspeed == config.deepspeed


def test_the_tables_of_keys_do_not_overlap() -> None:
    tables = [set(DIRECT), set(FIXED), set(NOT_NEEDED), set(NO_COUNTERPART)]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(tables, 2))
    assert all(key in DIRECT for defaults in DEFAULTS.values() for key in defaults)
    assert set().union(*tables) <= KNOWN
    for ours, _ in DIRECT.values():
        Config().get(ours)
