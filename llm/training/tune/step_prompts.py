"""Stage 7: a prompt that blocks of a step have in common is computed once a step, not once a block.

    two batches     [P a b] [P c d]       P is a node that others go on from: a few-shot prompt, the same contexts
    computed         P                    its keys and values in every layer are kept, and how they were made
                     [a b] after P        their gradient is collected
                     [c d] after P        with that of the last batch it goes on into P

Loss and gradients of the step are those of batches that compute P each. Nothing is kept that makes more of a step's
tokens live at once than its longest batch has.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm.training.tune.attention import States
from llm.training.tune.collator import IGNORE_INDEX, Batch

LEAST_SAVED = 0.05  # of the tokens of a step: a prompt by itself is one more pass through all layers
_TOKENS = ("input_ids", "labels", "position_ids")


class StepPrompt:
    """A prompt of `num_batches` batches, and while they are computed its states in every layer."""

    def __init__(self, input_ids: Tensor) -> None:
        """`input_ids`: int64 (1, tokens)."""
        self.num_batches = 0
        self._input_ids = input_ids
        self._made: States = {}
        self._lent: States = {}

    def states(self, backbone: nn.Module) -> States:
        """Keys and values of every layer for the next of the batches; the first one computes them."""
        if not self._made:
            self._compute(backbone)
        self.num_batches -= 1
        if self.num_batches:
            return self._lent
        made, lent = self._made, self._lent
        self._made, self._lent = {}, {}  # what they were made of lives as long as the last batch
        return {layer: tuple(map(_Joined.apply, made[layer], lent[layer])) for layer in made}

    def _compute(self, backbone: nn.Module) -> None:
        num_tokens = self._input_ids.shape[1]
        backbone(
            input_ids=self._input_ids,
            position_ids=torch.arange(num_tokens, device=self._input_ids.device)[None],
            node_lengths=[num_tokens],
            node_parents=[-1],
            kept_states=self._made,
            use_cache=False,
        )
        for layer, (key, value) in self._made.items():
            self._lent[layer] = _cut_off(key), _cut_off(value)


def share_prompts(batches: Sequence[Batch]) -> list[Batch]:
    """The batches of a step (`flatten_blocks`), without the tokens of prompts that they have in common.

    Those with the same prompt come one after the other. They have `prompts`, whose nodes come first in `node_lengths`
    and `node_parents`, and `known_nodes`: which of these a batch before them computes. A prompt is what a block of the
    step shares among its examples; where that would save less than LEAST_SAVED the batches stay as they are.
    """
    if all(parent < 0 for batch in batches for parent in batch["node_parents"]):
        return list(batches)
    uses = _uses([root for number, batch in enumerate(batches) for root in _roots(number, batch)])
    order = sorted(range(len(batches)), key=lambda number: max(uses[number].values(), key=len, default=b""))
    kept = _kept([batches[number] for number in order], [list(uses[number].values()) for number in order])
    num_saved = sum(_size(ids) for number in order for ids in uses[number].values() if ids in kept)
    num_saved -= sum(map(_size, kept))
    if num_saved < max(1, LEAST_SAVED * sum(map(_num_tokens, batches))):
        return list(batches)
    prompts: dict[bytes, StepPrompt] = {}
    return [
        _cut(batches[number], {node: ids for node, ids in uses[number].items() if ids in kept}, prompts)
        for number in order
    ]


def lend_prompts(batch: Batch, model: Any) -> Batch:
    """`batch` with what the attention needs of its prompts, `prompt_states`; once for each batch, in their order.

    `model` may have an adapter; what wraps it for several ranks must not be called for this.
    """
    if "prompts" not in batch:
        return batch
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return batch | {"prompt_states": [prompt.states(inner.base_model) for prompt in batch["prompts"]]}


@dataclass(frozen=True, kw_only=True)
class _Root:
    """A node without a parent; the first `num_prompt` of its tokens may be computed elsewhere."""

    batch: int
    node: int
    ids: bytes
    num_prompt: int
    is_shared: bool

    def begins_with(self, ids: bytes) -> bool:
        return _size(ids) <= self.num_prompt and self.ids.startswith(ids)


def _roots(number: int, batch: Batch) -> Iterator[_Root]:
    """What may begin with a prompt: up to the token from which the first label is predicted, or whole if shared."""
    parents = set(batch["node_parents"])
    ids, labels = (batch[name][0].cpu().split(batch["node_lengths"]) for name in ("input_ids", "labels"))
    for node, parent in enumerate(batch["node_parents"]):
        if parent < 0:
            trained = (labels[node] != IGNORE_INDEX).nonzero()
            is_shared = node in parents and not len(trained)
            num_alone = int(trained[0]) if len(trained) else len(ids[node])
            yield _Root(
                batch=number,
                node=node,
                ids=ids[node].numpy().tobytes(),
                num_prompt=len(ids[node]) if is_shared else num_alone - 1,
                is_shared=is_shared,
            )


def _uses(roots: Sequence[_Root]) -> defaultdict[int, dict[int, bytes]]:
    """For each batch the nodes that begin with a prompt, and its ids; those prompts first that save most."""
    users = {root.ids: [other for other in roots if other.begins_with(root.ids)] for root in roots if root.is_shared}
    uses: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
    for ids in sorted(users, key=lambda ids: (_size(ids) * (1 - len(users[ids])), ids)):
        free = [root for root in users[ids] if root.node not in uses[root.batch]]
        for root in free if len(free) > 1 else ():
            uses[root.batch][root.node] = ids
    return uses


def _kept(batches: Sequence[Batch], prompts: Sequence[list[bytes]]) -> set[bytes]:
    """The prompts that can be kept from their first batch to their last without more tokens in memory at once."""
    live = [_num_tokens(batch) for batch in batches]
    most, kept = max(live, default=0), set()
    for ids in sorted({ids for some in prompts for ids in some}, key=lambda ids: (-len(ids), ids)):
        times = [some.count(ids) for some in prompts]
        users = [number for number, num_uses in enumerate(times) if num_uses]
        changed = {n: live[n] + _size(ids) * (1 - times[n]) for n in range(users[0], users[-1] + 1)}
        if max(changed.values()) <= most:
            kept.add(ids)
            live = [changed.get(number, size) for number, size in enumerate(live)]
    return kept


def _cut(batch: Batch, begun: Mapping[int, bytes], prompts: dict[bytes, StepPrompt]) -> Batch:
    """`batch` without what its nodes in `begun` begin with; prompts that are not among `prompts` yet are put there."""
    if not begun:
        return batch
    known, order = set(prompts), list(dict.fromkeys(begun.values()))
    starts = {node: _size(ids) for node, ids in begun.items()}
    left = [node for node, length in enumerate(batch["node_lengths"]) if length > starts.get(node, 0)]
    pieces = {name: batch[name].split(batch["node_lengths"], dim=1) for name in _TOKENS}
    for node, ids in begun.items():
        prompts.setdefault(ids, StepPrompt(pieces["input_ids"][node][:, : _size(ids)]))
    for ids in order:
        prompts[ids].num_batches += 1
    numbers = {node: order.index(ids) for node, ids in begun.items()}
    parents = {node: numbers.get(node, -1) for node in left if batch["node_parents"][node] < 0}
    numbers |= {node: len(order) + place for place, node in enumerate(left)}
    parents |= {node: numbers[batch["node_parents"][node]] for node in left if node not in parents}
    return {
        **batch,
        **{name: torch.cat([pieces[name][node][:, starts.get(node, 0) :] for node in left], dim=1) for name in _TOKENS},
        "node_lengths": [*map(_size, order), *(pieces["labels"][node].shape[1] - starts.get(node, 0) for node in left)],
        "node_parents": [-1] * len(order) + [parents[node] for node in left],
        "prompts": [prompts[ids] for ids in order],
        "known_nodes": [place for place, ids in enumerate(order) if ids in known],
    }


def _size(ids: bytes) -> int:
    return len(ids) // torch.int64.itemsize


def _num_tokens(batch: Batch) -> int:
    return int(batch["input_ids"].shape[1])


def _cut_off(states: Tensor) -> Tensor:
    """The same numbers, where a gradient ends and is collected."""
    return states.detach().requires_grad_(states.requires_grad)


class _Joined(torch.autograd.Function):
    """The states as they were made: their gradient, and that which `lent` has collected, go on into the prompt."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, lent: Tensor) -> Tensor:
        ctx.lent = lent
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        collected = ctx.lent.grad
        return gradients[0] if collected is None else gradients[0] + collected, None
