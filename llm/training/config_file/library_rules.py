"""What the libraries' sources do not say of their keys: old names, limits, and what this program sets itself.

Used by `library_keys.problems_of`. Each table: key of a section -> what to write, or what may be written.
"""

import operator
from collections.abc import Callable
from typing import Any

from llm.training.config import DTYPES

# Names of older versions and of neighbouring tools: what to write today.
RENAMED = {
    "training_arguments": {
        "adafactor": "Write `optim: adafactor`.",
        "dataset_text_field": "dataprep takes the columns `input` and `response`.",
        "dispatch_batches": "Write `accelerator_config: {dispatch_batches: ...}`.",
        "evaluate_during_training": "Write `eval_strategy: steps`.",
        "evaluation_strategy": "It is called `eval_strategy` today.",
        "fp16_backend": "Delete it: there is one backend left.",
        "fp16_opt_level": "Delete it: there is one backend left.",
        "fsdp_min_num_params": "Write `fsdp_config: {min_num_params: ...}`.",
        "fsdp_transformer_layer_cls_to_wrap": "Write `fsdp_config: {transformer_layer_cls_to_wrap: [...]}`.",
        "group_by_length": "Write `train_sampling_strategy: group_by_length`.",
        "half_precision_backend": "Delete it: there is one backend left.",
        "include_inputs_for_metrics": "Write `include_for_metrics: [inputs]`.",
        "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR.",
        "max_length": "The length of a block is `chunksize` of dataprep.",
        "max_seq_length": "The length of a block is `chunksize` of dataprep.",
        "no_cuda": "Write `use_cpu: true`.",
        "overwrite_output_dir": "The top-level key `resume_from_checkpoint: false` starts anew.",
        "packing": "Packing is done by dataprep: its key `pack`.",
        "per_gpu_eval_batch_size": "It is called `per_device_eval_batch_size` today.",
        "per_gpu_train_batch_size": "It is called `per_device_train_batch_size` today.",
        "push_to_hub_model_id": "It is called `hub_model_id` today.",
        "save_safetensors": "Delete it: checkpoints are always safetensors.",
        "split_batches": "Write `accelerator_config: {split_batches: ...}`.",
        "torchdynamo": "It is called `torch_compile_backend` today.",
        "use_mps_device": "Delete it: an Apple GPU is used when there is one.",
        "warmup_ratio": "Write `warmup_steps: 0.03`: below 1 it is a share of all steps.",
        "xpu_backend": "It is called `ddp_backend` today.",
    },
    "lora_config": {
        "alpha": "It is called `lora_alpha`.",
        "dropout": "It is called `lora_dropout`.",
        "lora_r": "It is called `r`.",
        "lora_rank": "It is called `r`.",
        "rank": "It is called `r`.",
    },
    "quantization_config": {
        "bits": "Write `load_in_4bit: true` or `load_in_8bit: true`.",
        "compute_dtype": "It is called `bnb_4bit_compute_dtype`.",
        "double_quant": "It is called `bnb_4bit_use_double_quant`.",
        "quant_type": "It is called `bnb_4bit_quant_type`.",
    },
}

# What has its place elsewhere: the library would take it here, and this program would overrule it.
SET_ELSEWHERE = {
    "training_arguments": {
        "report_to": "Write it one level up, as the key `report_to`.",
        "resume_from_checkpoint": "Write it one level up, as the key `resume_from_checkpoint`.",
        "local_rank": "torchrun sets it.",
    },
    "lora_config": {
        "base_model_name_or_path": "It is set by the key `base_model`.",
        "peft_type": "It is always LORA.",
        "inference_mode": "It is always false in training.",
        "peft_version": "peft fills it in.",
    },
    "quantization_config": {},
}

# What is refused whatever its value, by other rules than those here.
NEVER_IN_YAML = {
    "output_dir": "It is set by the key `local_output`.",
    "hub_token": "It is a secret, and YAML files are copied: set the environment variable HF_TOKEN.",
}

# Values that the sources only know as text: of bitsandbytes, and what this program trains.
_DTYPES = tuple(name for name in DTYPES if name != "auto")
CHOICES = {
    "bnb_4bit_compute_dtype": _DTYPES,
    "bnb_4bit_quant_storage": ("uint8", "int8", *_DTYPES),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "task_type": ("CAUSAL_LM",),
}

Limit = tuple[Callable[[Any, Any], bool], str, float]
_AT_LEAST_0: Limit = (operator.ge, "at least", 0)
_AT_LEAST_1: Limit = (operator.ge, "at least", 1)
_ABOVE_0: Limit = (operator.gt, "greater than", 0)
_BELOW_1: Limit = (operator.lt, "less than", 1)
LIMITS: dict[str, tuple[Limit, ...]] = {
    "per_device_train_batch_size": (_AT_LEAST_1,),
    "per_device_eval_batch_size": (_AT_LEAST_1,),
    "gradient_accumulation_steps": (_AT_LEAST_1,),
    "learning_rate": (_ABOVE_0, (operator.lt, "less than", float("inf"))),
    "warmup_steps": (_AT_LEAST_0,),
    "weight_decay": (_AT_LEAST_0,),
    "max_grad_norm": (_AT_LEAST_0,),
    "adam_beta1": (_AT_LEAST_0, _BELOW_1),
    "adam_beta2": (_AT_LEAST_0, _BELOW_1),
    "adam_epsilon": (_ABOVE_0,),
    "label_smoothing_factor": (_AT_LEAST_0, _BELOW_1),
    "logging_steps": (_ABOVE_0,),
    "save_steps": (_ABOVE_0,),
    "eval_steps": (_ABOVE_0,),
    "save_total_limit": (_AT_LEAST_1,),
    "dataloader_num_workers": (_AT_LEAST_0,),
    "r": (_AT_LEAST_1,),
    "lora_alpha": (_ABOVE_0,),
    "lora_dropout": (_AT_LEAST_0, _BELOW_1),
}
