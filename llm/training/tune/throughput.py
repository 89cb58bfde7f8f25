"""What training computed and how fast: tokens, trained tokens, examples, FLOPs, and their share of the device's peak.

Counted from the batches, not from settings: padding is no token, a prompt that examples share is computed once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

# Dense FLOPs a second of 16-bit matrix products with 32-bit sums, by the start of what the driver calls the device,
# longer names first. NVIDIA's data sheets: where these say "with sparsity", half of it.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2": 125e12,
    "Tesla T4": 65e12,
}
# Other parameters of two or more dimensions than those of linear layers and embeddings: up to this share they are
# convolutions and the like; above, it is a model whose work cannot be read from its layers (experts, state spaces).
MOST_UNKNOWN = 0.02


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counts of what was computed, and the seconds it took without evaluation. `flops` is 0 where they are unknown."""

    tokens: int = 0
    trained_tokens: int = 0
    examples: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def counts(self) -> list[int]:
        """All but the seconds, in order."""
        return list(astuple(self)[:-1])

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """What a log shows: each per second; `mfu` (0 to 1) where `peak_flops`, those of all ranks, are known."""
        if not self.seconds:
            return {}
        rates = {
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens_per_second": self.trained_tokens / self.seconds,
            "examples_per_second": self.examples / self.seconds,
        }
        if self.flops:
            rates["tflops_per_second"] = self.flops / self.seconds / 1e12
            if peak_flops:
                rates["mfu"] = self.flops / self.seconds / peak_flops
        return rates


class StepFlops:
    """FLOPs of forward and backward over a batch (https://arxiv.org/abs/2204.02311, appendix B: "model FLOPs").

    A matrix product of m x n weights costs a token 2mn forward, 2mn for the gradient of its input, and 2mn for that of
    its weights only where these are trained. The head counts for trained tokens only. Attention counts the pairs of
    tokens that see one another. Recomputation (checkpointing) is no work. With frozen embeddings the first layer needs
    no gradient of its input: counted all the same, a hundredth at most.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model`: with its adapter, trained weights marked."""
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        config = inner.config.get_text_config()
        head = set(inner.get_output_embeddings().modules()) if inner.get_output_embeddings() is not None else set()
        layers = dict(_linear_layers(model))
        self.per_token = sum(_flops(module) for module in layers.values() if module not in head)
        self.per_label = sum(_flops(module) for module in layers.values() if module in head)
        self.windows = layer_windows(config)
        heads = getattr(config, "num_attention_heads", 0)  # 0: a state-space model
        self.per_pair: int = 12 * heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        """Of one layer: two products forward, four backward."""
        self.is_known = heads > 0 and _unknown_share(inner, layers.values()) <= MOST_UNKNOWN

    def of_batch(self, batch: Mapping[str, Any], *, num_labels: int) -> int:
        """Of a batch as the collator makes it; 0 for a model whose work is not known."""
        if not self.is_known:
            return 0
        paths = list(_paths(batch))
        attention = sum(num_pairs(own, path, window) for own, path in paths for window in self.windows) * self.per_pair
        return self.per_token * sum(own for own, _ in paths) + self.per_label * num_labels + attention


def count_work(batch: Mapping[str, Any], *, num_labels: int, flops: StepFlops) -> Work:
    """What a batch is, without the seconds."""
    if "node_lengths" in batch:
        num_tokens, parents = sum(own for own, _ in _paths(batch)), batch["node_parents"]
        num_examples = len(set(range(len(parents))) - set(parents))
    else:
        num_tokens, num_examples = int(batch["attention_mask"].sum()), len(batch["input_ids"])
    return Work(
        tokens=num_tokens,
        trained_tokens=num_labels,
        examples=num_examples,
        flops=flops.of_batch(batch, num_labels=num_labels),
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of one device in `dtype`; None where it is not known: a CPU, another GPU, 32-bit."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of the device of this name, `NVIDIA A100-SXM4-80GB`, in 16 bits."""
    # Longest first, and whole: an L40 is no L4.
    for known in sorted(PEAK_FLOPS, key=len, reverse=True):
        if name.startswith(known) and not name[len(known) :][:1].isalnum():
            return PEAK_FLOPS[known]
    return None


def layer_windows(config: Any) -> list[int | None]:
    """For each layer how many tokens one sees back from and with itself; None: all."""
    window = getattr(config, "sliding_window", None)
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def num_pairs(num_own: int, num_path: int, window: int | None) -> int:
    """How many pairs (query, key) the last `num_own` tokens of a path see: 3 tokens alone 1 + 2 + 3."""
    return _num_seen(num_path, window) - _num_seen(num_path - num_own, window)


def _num_seen(length: int, window: int | None) -> int:
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def _paths(batch: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Tokens of each node that is computed, and of the path that it ends."""
    if "node_lengths" not in batch:
        yield from ((length, length) for length in batch["attention_mask"].sum(dim=1).tolist())
        return
    ends: list[int] = []
    for node, (length, parent) in enumerate(zip(batch["node_lengths"], batch["node_parents"], strict=True)):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
        if node not in batch.get("known_nodes", ()):
            yield length, ends[-1]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer
        if is_linear and "original_module" not in name.split("."):  # of which peft trains a copy
            yield name, module


def _flops(module: nn.Module) -> int:
    """Of one token; the shape is that of the layer, since quantized weights are stored in another one."""
    weight = module.get_parameter("weight")
    size = module.in_features * module.out_features if isinstance(module, nn.Linear) else weight.numel()
    return (6 if weight.requires_grad else 4) * size


def _unknown_share(model: nn.Module, layers: Iterable[nn.Module]) -> float:
    """How much of the weights is in matrices that are neither linear layers nor embeddings."""
    known = {id(p) for module in layers for p in module.parameters(recurse=False)}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            known |= {id(p) for p in module.parameters(recurse=False)}
    sizes = [(p.numel(), id(p) in known or p.ndim < 2) for p in model.parameters()]
    return sum(size for size, is_known in sizes if not is_known) / max(1, sum(size for size, _ in sizes))
