"""Attention that keeps the examples of a block apart: each token sees its own node and that node's ancestors.

Takes the node structure of a flattened batch (`node_lengths`, `node_parents`) through the keyword arguments
of the model's forward, which every model written for `AttentionInterface` hands on to its attention function.
No mask over unrelated tokens is ever built:

    tokens          a b c d | e f | g h i       node_lengths  4 2 3
    node            0       | 1   | 2           node_parents  -1 0 0     (1 and 2 share the prompt 0)
    `f` sees        a b c d   e f
    `i` sees        a b c d         g h i

`nodes.py` reads the structure, `node_sdpa.py` attends node by node, `node_kernels.py` says which kernel does it where.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm.errors import ConfigError
from llm.training.tune.node_kernels import choose_kernel, trusted_kernel
from llm.training.tune.node_sdpa import ScoreRule, attend

NODE_ATTENTION = "llm_train_nodes"

States = dict[nn.Module, tuple[Tensor, Tensor]]
"""Of each attention layer the keys and values of some tokens, (1, key heads, tokens, head size)."""


def node_attention(  # noqa: PLR0913 (the library calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    node_lengths: Sequence[int] | None = None,
    node_parents: Sequence[int] | None = None,
    prompt_states: Sequence[States] = (),
    kept_states: States | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention output (batch, tokens, heads, head size), in the signature of `AttentionInterface`.

    `query` is (batch, heads, tokens, head size), `key` and `value` may have fewer heads. With node structure
    the batch is 1: a flattened one. `prompt_states` are of its first nodes, which are computed elsewhere;
    `kept_states` takes those of this batch. Without node structure, as when a model in training generates text,
    each row is one text, whose last tokens the queries are, under `attention_mask` if there is one. Raises
    ConfigError when the model asks for what is not computed here, ValueError for packed rows without node structure.
    """
    if attention_mask is not None and attention_mask.ndim > 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rule = _score_rule(module, attention_mask, kwargs)
    if node_lengths is None or node_parents is None:
        _refuse_packed(kwargs.get("position_ids"))
        output = attend(query, key, value, rule)
    else:
        if kept_states is not None:
            kept_states.setdefault(module, (key, value))  # once: checkpointing computes them again
        if prompt_states:
            before = [states[module] for states in prompt_states]
            key, value = (torch.cat([*(states[n] for states in before), own], 2) for n, own in enumerate((key, value)))
        nodes: dict[str, Any] = {"node_lengths": node_lengths, "node_parents": node_parents, "rule": rule}
        kernel = choose_kernel(query.device.type, dtype=query.dtype, **nodes)
        output = trusted_kernel(kernel, query, key, rule)(query, key, value, **nodes)
    return output.transpose(1, 2).contiguous(), None


def node_mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """What the model hands to `node_attention` as `attention_mask`, in the signature of
    `AttentionMaskInterface`.

    Without a padding mask the nodes decide, and nothing of the size tokens x tokens is made: None, or for a
    layer that sees `local_size` tokens that number, by which `node_attention` knows that the layer is
    windowed.
    """
    if attention_mask is None:
        return None if local_size is None else torch.tensor(local_size)
    kwargs["allow_is_causal_skip"] = False  # `None` would mean "the nodes decide"

    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **kwargs)


AttentionInterface.register(NODE_ATTENTION, node_attention)
AttentionMaskInterface.register(NODE_ATTENTION, node_mask)


def _score_rule(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> ScoreRule:
    """The rule of one layer; ConfigError for sinks, position biases, chunks and attention in both
    directions."""
    model = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    unknown = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        unknown.append("is_causal: false")
    window = kwargs.get("sliding_window")
    if attention_mask is not None and attention_mask.item() != window:
        unknown.append("a window that its attention function is not told")
    if unknown:
        raise ConfigError(
            f"base_model: `{model}` computes its attention with {', '.join(unknown)}, which training on packed "
            "blocks does not do: its loss would be wrong. Choose another base model."
        )
    return ScoreRule(
        scaling=kwargs.get("scaling"),
        dropout=kwargs.get("dropout", 0.0),
        window=window,
        softcap=kwargs.get("softcap"),
    )


def _refuse_packed(position_ids: Tensor | None) -> None:
    if position_ids is not None and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "these position_ids restart: the row holds several texts, and without `node_lengths` and `node_parents` "
            "they would see each other."
        )
