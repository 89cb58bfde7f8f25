"""What a model computes from a whole batch: refused where a flattened batch would change it."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import ARCHITECTURES, HEADS, make_block, make_model
from transformers import PreTrainedModel

from llm.errors import ConfigError, MissingExtraError
from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.collator import flatten_blocks
from llm.training.tune.data_check import Blocks, check_data
from llm.training.tune.loss import token_losses
from llm.training.tune.objective import has_liger, liger_arguments

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,
    },
    "original_max_position_embeddings": 12,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}


def blocks_of(*lengths: list[int]) -> Blocks:
    rows = [make_block(nodes, [-1] * len(nodes), seed=seed) for seed, nodes in enumerate(lengths)]
    return Blocks(train=Dataset.from_list(rows), evaluation=None, manifest=None)


def difference_from_alone(model: PreTrainedModel, lengths: list[int]) -> float:
    """The largest difference of a token loss in one flattened batch from that of each example alone (eager)."""
    block = make_block(lengths, [-1] * len(lengths))
    packed = token_losses(model, flatten_blocks([block]), has_logits_to_keep=True)
    model.set_attn_implementation("eager")
    alone, start = [], 0
    for length in lengths:
        ids = torch.tensor([block["input_ids"][start : start + length]])
        labels = torch.tensor([block["labels"][start : start + length]])
        batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}
        alone.append(token_losses(model, batch, has_logits_to_keep=True))
        start += length
    model.set_attn_implementation(NODE_ATTENTION)
    return float((packed - torch.cat(alone)).abs().max().detach())


def test_longrope_example_beyond_the_first_length_is_refused_where_batches_mix() -> None:
    model = make_model("phi3", **LONGROPE)
    assert difference_from_alone(model, [12, 9, 5]) < 1e-4  # all within the first length: right, however long the block
    assert difference_from_alone(model, [13, 9, 5]) > 1e-2  # one beyond it changes the others
    assert check_data(blocks_of([12, 9, 5]), model, max_batch_size=4)
    assert not check_data(blocks_of([13], [5]), model, max_batch_size=1)
    for blocks, batch_size in ((blocks_of([13, 5]), 1), (blocks_of([13], [5]), 2)):
        with pytest.raises(ConfigError) as caught:
            check_data(blocks, model, max_batch_size=batch_size)
        for part in ("more than 12 tokens", "longest example has 13", "`chunksize: 12`", "`pack: false`"):
            assert part in str(caught.value)


def test_dynamic_rope_counts_examples_not_the_flattened_batch() -> None:
    model = make_model("llama", **DYNAMIC, max_position_embeddings=16)
    assert difference_from_alone(model, [16, 15, 14]) < 1e-4
    assert check_data(blocks_of([16, 15, 14]), model, max_batch_size=4)


def test_router_loss_of_a_mixture_of_experts_is_refused_when_its_config_asks_for_it() -> None:
    experts = HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    ARCHITECTURES["mixtral"] = experts
    try:
        check_data(blocks_of([9, 5]), make_model("mixtral"), max_batch_size=1)
        assert difference_from_alone(make_model("mixtral"), [9, 5]) < 1e-4
        with pytest.raises(ConfigError, match='`mixtral` says `output_router_logits: true`.*"output_router_logits": f'):
            check_data(blocks_of([9, 5]), make_model("mixtral", output_router_logits=True), max_batch_size=1)
    finally:
        del ARCHITECTURES["mixtral"]


def test_liger_is_refused_where_it_cannot_run_and_keeps_the_forward_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert liger_arguments({}) == {} == liger_arguments({"use_liger_kernel": False})
    monkeypatch.setattr("llm.training.tune.objective.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="liger-kernel is not installed: pip install 'llm-train\\[cuda\\]'"):
        liger_arguments({"use_liger_kernel": True})
    monkeypatch.setattr("llm.training.tune.objective.find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="need a GPU"):
        liger_arguments({"use_liger_kernel": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    assert liger_arguments(given) == {"liger_kernel_config": {"fused_linear_cross_entropy": False, "rope": False}}


@pytest.mark.parametrize(
    ("given", "is_there", "expected"),
    [
        ({}, True, True),
        ({"use_liger_kernel": True}, True, True),
        ({"use_liger_kernel": False}, True, False),
        ({"use_cpu": True}, True, False),
        ({}, False, False),
    ],
)
def test_liger_computes_the_loss_on_a_gpu_that_has_it_unless_it_is_switched_off(
    given: dict[str, Any], is_there: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_liger(given), "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("llm.training.tune.objective.find_spec", lambda _: object() if is_there else None)
    assert has_liger(given) is expected
