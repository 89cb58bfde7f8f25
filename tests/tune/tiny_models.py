"""Tiny causal language models of many architectures, made on the spot, and blocks for them."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.lean_modules import use_lean_modules
from llm.training.tune.nodes import node_positions

VOCAB_SIZE = 97
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    # Large weights: with the usual 0.02 attention is nearly uniform and hides what leaks.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GEMMA = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
# Windows of 5 and 6 tokens are shorter than the examples of the tests.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen2": HEADS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": HEADS | {"head_dim": 8},
    "gemma2": HEADS | GEMMA | {"attn_logit_softcapping": 3.0},
    "gemma3_text": HEADS | GEMMA,
    "mistral": HEADS | {"sliding_window": 6},
    "phi3": HEADS | {"sliding_window": None},
    "gpt_neox": {"num_attention_heads": 4},
    "smollm3": HEADS,
    "opt": {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
}
# What does not keep packed examples apart, or asks for what our attention does not do.
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "gpt_oss": HEADS | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": {"state_size": 4},
    "falcon": {"num_attention_heads": 4, "alibi": False},
}


def make_model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model of `architecture` as it is trained, in eval mode; `changes` are of its configuration."""
    model = make_plain_model(architecture, **changes)
    model.set_attn_implementation(NODE_ATTENTION)
    use_lean_modules(model)
    return model


def make_plain_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """The same model as the library makes it."""
    settings = COMMON | (ARCHITECTURES | REFUSED)[architecture] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def make_block(
    node_lengths: Sequence[int], node_parents: Sequence[int], *, seed: int = 0, padding: int = 0
) -> dict[str, Any]:
    """A block of random ids of which the second half of each node is trained, and never its first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (sum(node_lengths),), generator=generator).tolist()
    labels: list[int] = []
    for length in node_lengths:
        first_label = max(1, length // 2)
        start = len(labels)
        labels.extend(ids[start + i] if i >= first_label else -100 for i in range(length))
    return {
        "input_ids": ids + [0] * padding,
        "attention_mask": [1] * len(ids) + [0] * padding,
        "labels": labels + [-100] * padding,
        "position_ids": node_positions(node_lengths, node_parents) + [0] * padding,
        "node_lengths": list(node_lengths),
        "node_parents": list(node_parents),
        "full_text": "",
        "example_rows": list(range(len(node_lengths))),
    }


def make_packed_dataset(num_blocks: int = 24, *, seed: int = 0) -> Dataset:
    """Blocks of two or three roots each, of different lengths and label counts, padded to 40."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for number in range(num_blocks):
        count = 2 + number % 2
        lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
        blocks.append(make_block(lengths, [-1] * count, seed=seed + number, padding=40 - sum(lengths)))
    return Dataset.from_list(blocks)


def make_prompted_dataset(num_blocks: int) -> Dataset:
    """Blocks of two or three examples after a prompt of 12 tokens that all blocks have, without labels in it."""
    prompt = list(range(10, 22))
    blocks = []
    for number in range(num_blocks):
        lengths = [12, 4 + number % 3, 5, *([3] * (number % 2))]
        block = make_block(lengths, [-1] + [0] * (len(lengths) - 1), seed=number)
        block["input_ids"][:12], block["labels"][:12] = prompt, [-100] * 12
        blocks.append(block)
    return Dataset.from_list(blocks)


def unpack(dataset: Dataset) -> Dataset:
    """The same examples, one a block (of blocks without sharing)."""
    rows = []
    for block in dataset:
        start = 0
        for length in block["node_lengths"]:
            span = slice(start, start + length)
            row = {name: block[name][span] for name in ("input_ids", "labels", "position_ids")}
            rows.append(row | {"node_lengths": [length], "node_parents": [-1]})
            start += length
    return Dataset.from_list(rows)
