"""The keys of DeepSpeed's JSON, grouped by how `deepspeed` converts them.

Names and defaults come from DeepSpeed's page "DeepSpeed Configuration JSON", runtime/zero/config.py and
runtime/lr_schedules.py. A key in none of these tables is an error, so no key is ignored silently.
"""

from __future__ import annotations

from typing import Any

DIRECT: dict[str, tuple[str, str]] = {
    "optimizer.params.lr": ("training.learning_rate", "the peak rate"),
    "optimizer.params.betas": ("training.betas", ""),
    "optimizer.params.eps": ("training.adam_eps", ""),
    "optimizer.params.weight_decay": ("training.weight_decay", "on weight matrices only"),
    "scheduler.params.warmup_max_lr": ("training.learning_rate", "the peak rate"),
    "scheduler.params.warmup_num_steps": ("training.warmup_steps", ""),
    "scheduler.params.total_num_steps": ("training.max_steps", "the run ends with its schedule"),
    "scheduler.params.cos_min_ratio": ("training.final_rate_fraction", ""),
    "gradient_clipping": ("training.max_grad_norm", ""),
    "steps_per_print": ("training.log_every_steps", "lines in metrics.jsonl"),
    "wandb.project": ("logging.project", ""),
}
"""Key → our key with the same meaning, and a note."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "optimizer": {
        "optimizer.params.betas": [0.9, 0.999],
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": 0.0,
    },
    "WarmupLR": {"scheduler.params.warmup_num_steps": 1000},
    "WarmupDecayLR": {"scheduler.params.warmup_num_steps": 1000},
    "WarmupCosineLR": {"scheduler.params.warmup_num_steps": 1000, "scheduler.params.cos_min_ratio": 1e-4},
}
"""DeepSpeed's defaults for an optimizer or a schedule (ops/adam/fused_adam.py). Its default peak rate is ours, 1e-3."""

STAGE = "zero_optimization.stage"
STAGES = {0: "ddp", 1: "fsdp", 2: "fsdp", 3: "fsdp"}

OPTIMIZER = "optimizer.type"
OPTIMIZERS = dict.fromkeys(("AdamW", "Adam", "adamw", "adam"), "AdamW")  # DeepSpeed's Adam decays as AdamW does

SCHEDULE = "scheduler.type"
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

PRECISIONS = {"fp16.enabled": "fp16", "bf16.enabled": "bf16", "bfloat16.enabled": "bf16"}

TRACKERS = {"wandb.enabled": "wandb", "tensorboard.enabled": "tensorboard"}

COMMUNICATION = "communication_data_type"
COMPRESSIONS = {"fp32": "none", "fp16": "fp16", "bf16": "bf16"}

BATCH, STEPS, MICRO = "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"

RECOMPUTING = (
    "activation_checkpointing.partition_activations",
    "activation_checkpointing.contiguous_memory_optimization",
    "activation_checkpointing.number_checkpoints",
)
"""Each of these turns on recomputation of activations."""

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "scheduler.params.warmup_min_lr": ((0,), "the warm-up starts at 0"),
    "scheduler.params.warmup_min_ratio": ((0,), "the warm-up starts at 0"),
    "scheduler.params.warmup_type": (("linear",), "the warm-up is linear"),
    "optimizer.params.adam_w_mode": ((True,), "decay is decoupled, as in AdamW"),
    "optimizer.params.bias_correction": ((True,), "moments are bias-corrected"),
    "optimizer.params.amsgrad": ((False,), "AMSGrad is not used"),
    "fp16.loss_scale": ((0,), "the loss scale is dynamic"),
    "fp16.fp16_master_weights_and_grads": ((False,), "weights and gradients are fp32"),
    "bf16.bf16_master_weights_and_grads": ((False,), "weights and gradients are fp32"),
    "bf16.bf16_optimizer_states": ((False,), "the optimizer's state is fp32"),
    "data_types.grad_accum_dtype": (("fp32", None), "gradients are accumulated in fp32"),
    "gradient_allreduce_op": (("mean",), "workers' gradients are averaged"),
    "activation_checkpointing.cpu_checkpointing": ((False, None), "nothing is offloaded"),
    "zero_optimization.offload_optimizer.device": (("none", None), "nothing is offloaded"),
    "zero_optimization.offload_param.device": (("none", None), "nothing is offloaded"),
    "zero_optimization.cpu_offload": ((False, None), "nothing is offloaded"),
    "zero_optimization.cpu_offload_param": ((False, None), "nothing is offloaded"),
    "zero_optimization.zero_hpz_partition_size": ((1,), "ZeRO++ has no counterpart"),
    "zero_optimization.zero_quantized_weights": ((False,), "ZeRO++ has no counterpart"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "ZeRO++ has no counterpart"),
    "zero_optimization.zero_quantized_gradients": ((False,), "ZeRO++ has no counterpart"),
    "zero_optimization.mics_shard_size": ((-1,), "MiCS has no counterpart"),
    "zero_optimization.mics_hierarchical_params_gather": ((False,), "MiCS has no counterpart"),
    "sparse_gradients": ((False,), "gradients are dense"),
    "sequence_parallel_size": ((1,), "a text is not split over workers"),
    "wandb.team": ((None,), "wandb reads WANDB_ENTITY"),
    "wandb.group": ((None,), "wandb reads WANDB_RUN_GROUP"),
}
"""Key → the values that match our fixed behaviour, and that behaviour. Any other value is an error."""

NO_COUNTERPART = frozenset(
    [
        "amp",
        "autotuning",
        "checkpoint",
        "comet",
        "comms_logger",
        "compile",
        "compression_training",
        "curriculum_learning",
        "data_efficiency",
        "elasticity",
        "eigenvalue",
        "flops_profiler",
        "hybrid_engine",
        "moe",
        "nebula",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "tensor_parallel",
        "torch_autocast",
        "weight_quantization",
        "zero_optimization.zenflow",
        "zero_optimization.leaf_module",
        "zero_optimization.zeropp_loco_param",
    ]
)
"""Features that must be switched off."""


def _each(why: str, names: str, block: str = "") -> dict[str, str]:
    return {block + name: why for name in names.split()}


_OFFLOADING = "pin_memory nvme_path buffer_count buffer_size max_in_cpu fast_init pipeline_read pipeline_write ratio"
_AIO = "block_size queue_depth thread_count intra_op_parallelism single_submit overlap_events use_gds"

NOT_NEEDED: dict[str, str] = (
    _each(
        "fsdp schedules its own communication",
        "overlap_comm contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions "
        "allgather_bucket_size use_multi_rank_bucket_allreduce round_robin_gradients sub_group_size "
        "ignore_unused_parameters parameter_alignment compute_grad_norm memory_efficient_linear override_module_apply "
        "pipeline_loading_checkpoint load_from_fp32_weights elastic_checkpoint legacy_stage1 log_trace_cache_warnings "
        "enable_sanity_checks save_muon_momentum_buffer_in_memory cpu_offload_use_pin_memory "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_module_granularity_threshold "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_partition_stream_chunk_size",
        "zero_optimization.",
    )
    | _each(
        "saved models are always gathered",
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
        "zero_optimization.",
    )
    | _each("nothing is offloaded", _OFFLOADING, "zero_optimization.offload_optimizer.")
    | _each("nothing is offloaded", _OFFLOADING, "zero_optimization.offload_param.")
    | _each("nothing is offloaded", _AIO, "aio.")
    | _each("nothing is offloaded", _AIO, "zero_optimization.aio.")
    | _each(
        "the loss scale adapts by itself",
        "initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale auto_cast",
        "fp16.",
    )
    | _each("gradients are fp32", "check_grad_overflow immediate_grad_update", "bf16.")
    | _each("gradients are fp32", "check_grad_overflow immediate_grad_update", "bfloat16.")
    | _each("torch's fused AdamW", "torch_adam fused foreach set_grad_none", "optimizer.params.")
    | _each("torch's fused AdamW", "legacy_fusion zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _each("layers are recomputed one by one", "synchronize_checkpoint_boundary profile", "activation_checkpointing.")
    | _each("the mean over workers is the same", "prescale_gradients gradient_predivide_factor disable_allgather")
    | _each("an epoch has only full batches", "dataloader_drop_last")
    | _each("each log line shows throughput", "wall_clock_breakdown memory_breakdown dump_state")
    | _each("event files are written to the run's folder", "output_path job_name", "tensorboard.")
    | _each("metrics.jsonl has the same numbers", "enabled output_path job_name", "csv_monitor.")
)
"""Key → why it is not needed: it tunes speed, memory or printing and does not change the training's results."""

KNOWN = frozenset(
    {STAGE, OPTIMIZER, SCHEDULE, COMMUNICATION, BATCH, STEPS, MICRO, *RECOMPUTING, *NO_COUNTERPART}
).union(DIRECT, PRECISIONS, TRACKERS, FIXED, NOT_NEEDED)

BLOCKS = frozenset(key[:end] for key in KNOWN for end, sign in enumerate(key) if sign == ".")
"""Keys that hold further keys."""
