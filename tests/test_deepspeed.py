"""DeepSpeed's JSON as keys of our own: files that people have, what is refused, and the arithmetic of batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.from_deepspeed import main
from pipeline.config import Config, ConfigError, load
from pipeline.config.deepspeed import Row, convert
from pipeline.config.deepspeed_keys import DEFAULTS, DIRECT, FIXED, KNOWN, NO_COUNTERPART, NOT_NEEDED
from pipeline.config.reading import assign

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


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are looked up from where a command is run."""
    monkeypatch.chdir(tmp_path)


def converted(content: str | dict[str, Any]) -> tuple[dict[str, Any], dict[str, Row]]:
    """Our keys and the rows by key, of a DeepSpeed file: its text, or its values by dotted keys."""
    if not isinstance(content, str):
        tree: dict[str, Any] = {}
        for key, value in content.items():
            assign(tree, key.split("."), value, "")
        content = json.dumps(tree)
    Path("ds.json").write_text(content)
    ours, rows = convert(Path("ds.json"))
    return ours, {row.key: row for row in rows}


def training(content: str | dict[str, Any]) -> dict[str, Any]:
    return converted(content)[0].get("training", {})


def refusal(content: str | dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        converted(content)
    return str(caught.value)


def sizes(batch: Any, micro: Any, steps: Any) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: size for key, size in zip(keys, (batch, micro, steps), strict=True) if size is not None}


def test_transformers_zero_2_and_3() -> None:
    ours, rows = converted(ZERO_2)
    assert ours == {"training": {"strategy": "fsdp", "schedule": "constant", "log_every_steps": 2000}}
    stays = Row("optimizer.params.lr", "auto", "", "training.learning_rate keeps its default")
    assert rows["optimizer.params.lr"] == stays
    assert "at any stage" in rows["zero_optimization.stage"].note
    assert rows["zero_optimization.overlap_comm"].note.startswith("not needed")
    assert "log" in rows["scheduler.params.warmup_type"].note
    third = {"strategy": "fsdp", "schedule": "linear", "final_rate_fraction": 0, "log_every_steps": 2000}
    assert converted(ZERO_3)[0] == {"training": third}


def test_the_command_prints_a_config_under_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ds.json").write_text(SPECIFIED)
    assert main(["ds.json"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == yaml.safe_load("""
        scaling: {num_workers: 2}
        model: {gradient_checkpointing: true}
        logging: {trackers: [wandb, tensorboard], project: theses}
        training:
          {global_batch_size: 64, gradient_accumulation_steps: 8, log_every_steps: 50, max_steps: 500, strategy: fsdp,
           learning_rate: 3.0e-5, betas: [0.8, 0.999], adam_eps: 1.0e-6, weight_decay: 3.0e-7, max_grad_norm: 0.5,
           schedule: cosine, warmup_steps: 20, final_rate_fraction: 0.1, precision: bf16, gradient_compression: none}
    """)
    Path("c.yaml").write_text(printed)
    assert load("c.yaml", environ={}).training.betas == [0.8, 0.999]
    table = [line for line in printed.splitlines() if line.startswith("#")]
    rows = converted(SPECIFIED)[1]
    assert len(table) == 1 + len(rows)
    assert any("training.betas=[0.8, 0.999]" in line for line in table)
    assert list(rows)[:4] == [*sizes(64, 4, 8), "steps_per_print"]
    assert {"amp", "flops_profiler", "csv_monitor.enabled", "zero_optimization.offload_param"} <= rows.keys()
    micro = "train_micro_batch_size_per_gpu"
    assert rows[micro] == Row(micro, "4", "scaling.num_workers=2", "64 = 4 x 8 x 2 workers")


def test_the_command_exits_2_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ds.json").write_text('{"zero_optimization": {"offload_param": {"device": "cpu"}}}')
    assert main(["ds.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("from_deepspeed: ds.json: zero_optimization.offload_param.device: found 'cpu'")


def test_no_value_leaves_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ds.json").write_text(json.dumps({"wandb": {"project": "a\ntraining: {seed: 7}"}}))
    assert main(["ds.json"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"logging": {"project": "a\ntraining: {seed: 7}"}}


def test_deepspeeds_defaults_where_its_file_does_not_say() -> None:
    schedule = {"scheduler.type": "WarmupCosineLR", "scheduler.params.total_num_steps": 5000}
    ours, rows = converted({"optimizer.type": "AdamW", "optimizer.params.lr": 1e-4, **schedule})
    found = ours["training"]
    assert (found["betas"], found["adam_eps"], found["weight_decay"]) == ([0.9, 0.999], 1e-8, 0.0)
    assert (found["warmup_steps"], found["final_rate_fraction"]) == (1000, 1e-4)
    betas = "optimizer.params.betas"
    assert rows[betas] == Row(betas, "", "training.betas=[0.9, 0.999]", "DeepSpeed's default")


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
        assert Config.model_validate(converted(file)[0]).get(f"training.{key}") == expected, file


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
        file = json.dumps({"scheduler": {"type": kind, "params": parameters}})
        found = Config.model_validate(converted(file)[0]).training
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
        assert converted(dict.fromkeys(sorted(NO_COUNTERPART), off))[0] == {}
    for key in NO_COUNTERPART:
        assert f"{key}: found" in (sentence := refusal({key: {"enabled": True}}))
        assert "no counterpart" in sentence
    for on in ({"some": "thing"}, True):
        assert "no counterpart" in refusal({"amp": on})


def test_what_adam_and_a_warm_up_are_here_anyway() -> None:
    for name, as_here in (("adam_w_mode", True), ("bias_correction", True), ("amsgrad", False)):
        key = f"optimizer.params.{name}"
        for value in (as_here, "auto"):
            _, rows = converted({"optimizer.type": "Adam", key: value})
            assert rows[key].note.startswith("same as ours")
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
    assert "optimizer.type: found nothing" in refusal({"optimizer.params.lr": 1e-4})


def test_a_value_out_of_our_range_names_both_keys() -> None:
    rate = {"optimizer.type": "AdamW", "optimizer.params.lr": 11}
    assert refusal(rate).startswith("ds.json (optimizer.params.lr): training.learning_rate: found 11")
    assert refusal({"gradient_clipping": 0}).startswith("ds.json (gradient_clipping): training.max_grad_norm: found 0")
    assert refusal({"train_batch_size": 1}).startswith("ds.json (train_batch_size): training.global_batch_size")
    both = {"communication_data_type": "fp16", "zero_optimization.stage": 2}
    assert refusal(both).startswith("ds.json: training: ")


def test_a_file_that_is_no_json_object_or_not_there() -> None:
    for content, mentions in (
        ("", "not JSON"),
        ('{"fp16": ', "not JSON"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"gradient_clipping": NaN}', "NaN is not a number"),
        ("[1]", "found [1] (a list)"),
        ("null", "found null"),
    ):
        sentence = refusal(content)
        assert sentence.startswith("ds.json: ")
        assert mentions in sentence
    with pytest.raises(ConfigError, match=r"^nowhere/ds\.json: No such file or directory"):
        convert(Path("nowhere/ds.json"))


def test_batch_arithmetic() -> None:
    """(Global batch, micro-batch, steps) of the file, and (global batch, steps, workers) of ours."""
    for file, expected in (
        ((64, None, None), (64, 1, "auto")),
        ((64, None, 4), (64, 4, "auto")),
        (("auto", "auto", "auto"), (256, 1, "auto")),
        ((64.0, 4, 16), (64, 16, 1)),
        *(
            ((m * s * w, m, s), (m * s * w, s, w))
            for m, s, w in itertools.product(range(1, 6), repeat=3)
            if m * s * w > 1
        ),
    ):
        config = Config.model_validate(converted(sizes(*file))[0])
        found = (config.training.global_batch_size, config.training.gradient_accumulation_steps)
        assert (*found, config.scaling.num_workers) == expected, file


def test_batches_that_do_not_add_up() -> None:
    open_number = "train_micro_batch_size_per_gpu: found 4; allowed is auto, or a number if train_batch_size and grad"
    for file, mentions in (
        ((64, 4, 3), "train_batch_size: found 64; allowed is 4 x 3 x the number of workers"),
        ((4, 4, 8), "train_batch_size: found 4; allowed is 4 x 8 x the number of workers"),
        ((64, 4, None), open_number),
        ((None, 4, 8), open_number),
        (("auto", 4, "auto"), open_number),
    ):
        assert refusal(sizes(*file)).startswith(f"ds.json: {mentions}")


def test_the_tables_of_keys_do_not_overlap() -> None:
    tables = [set(DIRECT), set(FIXED), set(NOT_NEEDED), set(NO_COUNTERPART)]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(tables, 2))
    assert all(key in DIRECT for defaults in DEFAULTS.values() for key in defaults)
    assert set().union(*tables) <= KNOWN
    for ours, _ in DIRECT.values():
        Config().get(ours)
