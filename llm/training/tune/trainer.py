"""The training loop: Hugging Face `Trainer` with a loss that no split into batches or ranks changes.

Stage 7 of the road. Takes a model and checked blocks; what the Trainer does beyond the loss is the Trainer's.
"""

import logging
import time
from collections import deque
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llm.errors import ConfigError, DataError
from llm.training.config import FinetuneConfig, default_training_arguments
from llm.training.tune.base_model import resolve_precision, warn_of_slow_autocast
from llm.training.tune.collator import COLUMNS, Batch, flatten_blocks, pad_blocks
from llm.training.tune.head import find_plain_head, summed_losses
from llm.training.tune.loss import has_logits_to_keep, sums_by_block, token_losses
from llm.training.tune.objective import liger_arguments
from llm.training.tune.step_prompts import lend_prompts, share_prompts
from llm.training.tune.throughput import StepFlops, Work, count_work, peak_flops
from llm.training.tune.tracking import resolve_report_to, tracking_arguments

logger = logging.getLogger(__name__)
MAX_BLOCKS_LISTED = 16


class BlockTrainer(Trainer):
    """A `Trainer` of blocks.

    Training loss: sum of token losses / trained tokens of the whole step, over accumulation and ranks.
    Evaluation loss: sum over the whole set / its trained tokens. `is_flat`: batches are flattened
    (`keeps_examples_apart`). `has_liger`: the loss is computed by its kernel.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        is_flat: bool = True,
        has_liger: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `Trainer`; `kwargs` are its further arguments. ConfigError when one process has several GPUs."""
        if args.n_gpu > 1:
            raise ConfigError(
                f"This process sees {args.n_gpu} GPUs and would cut blocks in pieces. Start one per GPU "
                f"(torchrun --nproc-per-node {args.n_gpu} llm/training/finetune.py config.yaml), or show it "
                "only one (CUDA_VISIBLE_DEVICES=0)."
            )
        if args.world_size > len(train_dataset):
            raise DataError(
                f"train_dataset_config: {len(train_dataset)} blocks cannot be shared among {args.world_size} ranks. "
                "Start fewer (torchrun --nproc-per-node), or prepare more blocks (a smaller `chunksize`)."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=_NumberedBlocks(train_dataset),
            eval_dataset=_NumberedBlocks(eval_dataset) if eval_dataset is not None else None,
            data_collator=flatten_blocks if is_flat else pad_blocks,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # prints raw dictionaries; `progress.py` shows what it would
        # so that the Trainer counts the trained tokens of the whole step
        self.model_accepts_loss_kwargs = True
        self._has_logits_to_keep = has_logits_to_keep(model)
        self._has_liger = has_liger
        self._is_plain = is_flat and not self._changes_modules
        self._head = find_plain_head(model) if self._is_plain else None
        self.work = Work()
        """What all ranks computed."""
        self._work, self._flops = Work(), StepFlops(model)
        self._counted_since = time.perf_counter()
        self._eval_sums: list[tuple[Tensor, Tensor]] = []
        self._blocks = train_dataset
        self._step_losses: deque[tuple[list[int], Tensor]] = deque(maxlen=args.gradient_accumulation_steps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """The batches of a step, without the prompts that they have in common, and their trained tokens."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        return share_prompts(batches) if self._is_plain else batches, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This batch's share of the step's loss: its sum of token losses / `num_items_in_batch`."""
        assert num_items_in_batch is not None and not return_outputs
        # Accelerate's wrapper turns all logits into float32: what it wraps is called, under the same autocast.
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        loss, num_labels = self._summed_losses(model, lend_prompts(inputs, inner))
        self._work += count_work(inputs, num_labels=num_labels, flops=self._flops)
        self._step_losses.append((inputs["blocks"], loss.detach()))
        # A step of which no rank has a label leaves the weights as they are.
        share = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # gradients are averaged over the ranks
        return share

    def _summed_losses(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        smoothing = self.args.label_smoothing_factor
        if self._head is not None and not smoothing:
            return summed_losses(model, inputs, self._head, has_liger=self._has_liger)
        losses = token_losses(model, inputs, has_logits_to_keep=self._has_logits_to_keep, label_smoothing=smoothing)
        return losses.sum(), len(losses)

    @property
    def _changes_modules(self) -> bool:
        """Whether layers are compiled, or their weights are only there while they are called."""
        return self.args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision, as the Trainer's arguments ask for it."""
        return self.accelerator.autocast()

    def describe_step(self) -> str:
        """Which blocks and source rows of this rank's last step have a loss that is not finite: a sentence."""
        wrong = [block for blocks, loss in self._step_losses if not loss.isfinite() for block in blocks]
        some = wrong or [block for blocks, _ in self._step_losses for block in blocks]
        listed = ", ".join(self._describe_block(block) for block in some[:MAX_BLOCKS_LISTED])
        more = f" and {len(some) - MAX_BLOCKS_LISTED} more" if len(some) > MAX_BLOCKS_LISTED else ""
        if wrong:
            return f"The loss is not finite in a batch of train_dataset_config, {listed}{more} (counted from 0)."
        here = " of this rank" if self.args.world_size > 1 else ""
        return f"The losses{here} are finite; the step was {listed}{more} of train_dataset_config (counted from 0)."

    def _describe_block(self, block: int) -> str:
        if "example_rows" not in self._blocks.column_names:
            return f"block {block}"
        return f"block {block} (source rows {', '.join(str(row) for row in self._blocks[block]['example_rows'])})"

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Adds the sums and counts of the blocks to those of the evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = token_losses(model, inputs, has_logits_to_keep=self._has_logits_to_keep)
        counts = inputs["num_block_labels"]
        # By block, since that is what is dropped where the last batch was filled up to serve all ranks.
        sums = sums_by_block(losses.double(), counts)
        self._eval_sums.append(self.accelerator.gather_for_metrics((sums, counts)))
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's loop, whose loss is the token mean of the whole set."""
        self._eval_sums, started = [], time.perf_counter()
        output = super().evaluation_loop(*args, **kwargs)
        total = sum(float(sums.sum()) for sums, _ in self._eval_sums)
        num_labels = sum(int(counts.sum()) for _, counts in self._eval_sums)
        prefix = kwargs.get("metric_key_prefix", "eval")
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_loss": total / num_labels, f"{prefix}_trained_tokens": num_labels})
        self._counted_since += time.perf_counter() - started
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what all ranks computed each second since the last log (`Work.rates`)."""
        if "loss" in logs or "train_loss" in logs:  # the second is the log at the end
            seconds = time.perf_counter() - self._counted_since
            counts = self.accelerator.reduce(torch.tensor(self._work.counts, device=self.args.device), "sum").tolist()
            work = Work(**dict(zip(vars(self._work), counts, strict=False)), seconds=seconds)
            self.work += work
            self._work, self._counted_since = Work(), time.perf_counter()
            if "loss" in logs:
                logs |= work.rates(self.peak_flops)
        super().log(logs, start_time)

    @property
    def peak_flops(self) -> float | None:
        """Of the devices of all ranks; None where it is not known."""
        assert self.model is not None
        fast = {torch.bfloat16: self.args.bf16, torch.float16: self.args.fp16}
        dtype = next((dtype for dtype, is_on in fast.items() if is_on), self.model.dtype)
        peak = peak_flops(self.args.device, dtype)  # type: ignore[arg-type]
        return peak and peak * self.args.world_size

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; the clock of the throughput starts here."""
        self._counted_since = time.perf_counter()
        assert self.model is not None
        with disable_input_dtype_casting(self.model, active=is_cast_by_autocast(self.model, self.accelerator)):
            return super().train(*args, **kwargs)


def is_cast_by_autocast(model: Any, accelerator: Accelerator) -> bool:
    """Whether LoRA may leave its inputs as they are: autocast gives its layers one type, and casting them to float32
    and back, as peft does, costs a bfloat16 step 8 % for the same numbers. DoRA computes more than layers."""
    is_plain_lora = isinstance(model, PeftModel) and not getattr(model.active_peft_config, "use_dora", False)
    return is_plain_lora and accelerator.native_amp


def training_arguments(config: FinetuneConfig) -> TrainingArguments:
    """The Trainer's arguments: our defaults, over them the user's; ConfigError with the library's text.

    Autocast follows `torch_dtype`. `save_total_limit` is None: `CheckpointCallback` rotates, after the new
    checkpoint is whole; `merged_arguments` has the number.
    """
    precision = resolve_precision(config)
    given = config.training_arguments
    warn_of_slow_autocast(config)
    if config.eval_dataset_config is None and given.get("eval_strategy", "no") not in ("no", False):
        raise ConfigError(
            f"training_arguments.eval_strategy: `{given['eval_strategy']}` needs blocks to evaluate. Add "
            "`eval_dataset_config`, or take out `eval_strategy`."
        )
    ours: dict[str, Any] = {
        "output_dir": config.local_output,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": resolve_report_to(config),
    }
    autocast: dict[str, Any] = {}
    if not {"bf16", "fp16"} & set(given):
        autocast = {
            "bf16": precision.autocast is torch.bfloat16,
            "fp16": precision.autocast is torch.float16,
        }
    ours |= liger_arguments(given) | {"save_total_limit": None}
    arguments = tracking_arguments(config) | merged_arguments(config) | autocast | ours
    try:
        return TrainingArguments(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training_arguments: {error}") from error


def merged_arguments(config: FinetuneConfig) -> dict[str, Any]:
    """`default_training_arguments`, over them the user's `training_arguments`."""
    is_cuda = torch.cuda.is_available() and not config.training_arguments.get("use_cpu")
    defaults = default_training_arguments(
        has_eval_dataset=config.eval_dataset_config is not None,
        is_lora=config.lora_config is not None,
        is_cuda=is_cuda,
    )
    if not torch.accelerator.is_available():
        # Else bfloat16 autocast is refused, and PyTorch warns of pinned memory.
        defaults |= {"use_cpu": True, "dataloader_pin_memory": False}
    return _current_names(defaults) | _current_names(config.training_arguments)


def _current_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """`gradient_checkpointing` under the name of transformers 5.23, which warns of the old one even where it
    is off.

    Delete with transformers 5.22.
    """
    known = {field.name for field in fields(TrainingArguments)}
    renamed = {name: name.replace("gradient_checkpointing", "activation_checkpointing") for name in arguments}
    return {renamed[name] if renamed[name] in known else name: value for name, value in arguments.items()}


class _NumberedBlocks(TorchDataset[dict[str, Any]]):
    """The columns of blocks that are trained on, and as `block` the number of each."""

    def __init__(self, blocks: Dataset) -> None:
        self._arrays = blocks.select_columns(list(COLUMNS)).with_format("numpy")

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self._arrays[number], "block": number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        rows = self._arrays.__getitems__(numbers)  # one read for all: what the data loader calls
        return [{**row, "block": number} for row, number in zip(rows, numbers, strict=True)]
