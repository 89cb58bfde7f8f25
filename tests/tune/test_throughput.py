"""FLOPs are those that torch counts, and rates are of what was computed."""

import pytest
import torch
from tiny_models import ARCHITECTURES, HEADS, REFUSED, make_block, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llm.training.tune.adapter import add_adapter
from llm.training.tune.collator import flatten_blocks, pad_blocks
from llm.training.tune.loss import token_losses
from llm.training.tune.throughput import PEAK_FLOPS, StepFlops, Work, count_work, num_pairs, peak_flops, peak_of

# What torch does not count: the product of an addition in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, rows, columns, **__: 2 * rows[0] * rows[1] * columns[1]}


def counted_by_torch(model: PreTrainedModel, batch: dict[str, object]) -> tuple[int, int]:
    """FLOPs of the linear layers, and of attention, forward and backward."""
    model.train()
    if not model.get_input_embeddings().weight.requires_grad:
        model.enable_input_require_grads()  # else the first layer computes no gradient of its input
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        losses = token_losses(model, batch, has_logits_to_keep=True)
        losses.sum().backward()
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(found.pop(name, 0) for name in ("aten.mm", "aten.addmm", "aten.addmm_"))
    return linear, sum(found.values())


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_flops_of_linear_layers_are_those_that_torch_counts(architecture: str, is_lora: bool) -> None:
    model = add_adapter(make_model(architecture), {"r": 4} if is_lora else None, {})
    batch = flatten_blocks([make_block([9, 6, 5], [-1, 0, 0]), make_block([7, 8], [-1, -1])])
    linear, _ = counted_by_torch(model, batch)
    num_labels = int((batch["labels"] != -100).sum())
    flops = StepFlops(model)
    assert flops.is_known and flops.per_label > 0
    assert flops.per_token * 35 + flops.per_label * num_labels == linear


def test_flops_of_attention_are_those_of_its_products() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    batch = {"input_ids": torch.ones(1, 10, dtype=torch.long), "labels": torch.ones(1, 10, dtype=torch.long)}
    _, attention = counted_by_torch(model, batch)
    flops = StepFlops(model)
    assert len(flops.windows) == 2
    # Eager attention computes all 100 pairs, and torch's counter calls its products bmm; of these 55 are seen.
    assert attention == 2 * flops.per_pair * 10 * 10
    assert num_pairs(10, 10, None) == 55


def test_pairs_of_a_node_are_those_that_it_sees() -> None:
    for own, path, window in [(3, 3, None), (2, 5, None), (5, 5, 2), (2, 5, 2), (4, 9, 6), (1, 1, 4)]:
        seen = [min(position + 1, window or path) for position in range(path - own, path)]
        assert num_pairs(own, path, window) == sum(seen)


def test_shared_prompt_is_counted_once_and_padding_never() -> None:
    model = make_model("llama")
    flops = StepFlops(model)
    shared = count_work(flatten_blocks([make_block([9, 6, 5], [-1, 0, 0], padding=4)]), num_labels=8, flops=flops)
    assert shared.counts[:3] == [20, 8, 2]
    rows = [make_block([9], [-1], padding=3), make_block([4], [-1])]
    padded, flat = (count_work(collate(rows), num_labels=6, flops=flops) for collate in (pad_blocks, flatten_blocks))
    assert padded == flat and padded.counts[:3] == [13, 6, 2]


def test_experts_are_unknown_work() -> None:
    ARCHITECTURES["mixtral"] = HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    try:
        work = count_work(flatten_blocks([make_block([9], [-1])]), num_labels=3, flops=StepFlops(make_model("mixtral")))
    finally:
        del ARCHITECTURES["mixtral"]
    assert work.flops == 0
    rates = (work + Work(seconds=2.0)).rates(1e12)
    assert rates == {"tokens_per_second": 4.5, "trained_tokens_per_second": 1.5, "examples_per_second": 0.5}


def test_layer_that_peft_copies_is_counted_once() -> None:
    whole = StepFlops(add_adapter(make_model("llama"), {"r": 4}, {}))
    copied = StepFlops(add_adapter(make_model("llama"), {"r": 4, "modules_to_save": ["lm_head"]}, {}))
    assert copied.per_token == whole.per_token
    assert copied.per_label == whole.per_label * 6 // 4  # and its weights are trained


def test_peak_is_that_of_the_named_device_or_unknown() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12 and peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA L4") == 121e12 and peak_of("NVIDIA L40S") == 362e12 and peak_of("NVIDIA A10G") == 70e12
    assert peak_of("NVIDIA L40") is None and peak_of("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_of("AMD Instinct MI300X") is None and len(PEAK_FLOPS) > 10
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *REFUSED])
def test_work_of_any_architecture_is_known_or_said_to_be_unknown(architecture: str) -> None:
    flops = StepFlops(make_model(architecture))
    assert flops.is_known is (architecture not in ("mamba", "gpt_oss"))
