"""Attention kernels over blocks with and without a shared prompt, in turns: seconds, ratio to ours, difference.

    python benchmarks/attention.py [--dtype float32] [--repeats 5] [--threads 2] [--blocks 1]
    python benchmarks/attention.py --step .cache/SmolLM2-135M-Instruct [--repeats 2]

The first measures one layer's attention, forward and backward, in the shapes of SmolLM2-135M and of a 7B model; the
second a whole training step (forward, loss, backward) of a model with LoRA of rank 16 on one block of random ids.
The same two commands measure a GPU, where there is one: what `llm/training/tune/node_kernels.py` chooses among.

    nodes      `attend_nodes`: node by node, what a CPU trains with. What the ratios are to
    library    CPU, bfloat16: PyTorch's scaled_dot_product_attention node by node, in place of our products
    varlen     CUDA, 16 bits, no shared prompt: PyTorch's varlen_attn
    flex       CUDA: FlexAttention, compiled
    unmerged   CPU: the prompt for all its children in one unmasked scaled_dot_product_attention, and each node by
               itself, added: not the result, but less than what a merge by log-sum-exp would cost

On the CPU, CPU seconds are given beside those of the clock: on a shared machine only they can be compared.
`diff`: largest relative difference to `nodes` of the output and the gradients.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]

from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM  # noqa: E402

from llm.training.tune.attention import node_mask  # noqa: E402
from llm.training.tune.collator import IGNORE_INDEX  # noqa: E402
from llm.training.tune.loss import has_logits_to_keep, token_losses  # noqa: E402
from llm.training.tune.node_kernels import Kernel, attend_flex, attend_varlen  # noqa: E402
from llm.training.tune.node_sdpa import ScoreRule, attend_nodes  # noqa: E402
from llm.training.tune.nodes import node_paths, node_positions  # noqa: E402

Nodes = tuple[list[int], list[int]]
Run = Callable[[], list[Tensor]]

# A block of 4,096 of PubMedQA behind three of its rows as examples, and the same number of tokens otherwise.
BLOCKS: dict[str, Nodes] = {
    "prompt 1147 + 10 x ~290": ([1147, 287, 289, 292, 342, 286, 294, 288, 292, 291, 288], [-1] + [0] * 10),
    "prompt 1147 + 20 x ~147": ([1147] + [147] * 20, [-1] + [0] * 20),
    "12 x 341 alone": ([341] * 12, [-1] * 12),
}
SHAPES = {"SmolLM2-135M": (9, 3, 64), "7B": (32, 8, 128)}
COLUMNS = f"{'block':<26} {'kernel':<9} {'ms':>8} {'ratio':>6} {'CPU ms':>8} {'ratio':>6} {'diff':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention kernels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=len(BLOCKS), help="how many of the blocks, from the first")
    parser.add_argument("--step", metavar="MODEL")
    given = parser.parse_args()
    for name in list(BLOCKS)[given.blocks :]:
        del BLOCKS[name]
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    print(described(device, dtype))
    if given.step:
        report(step_runs(given.step, device, dtype), device, given.repeats)
        return
    for shape in given.shape:
        print(f"\none layer of {shape}: {SHAPES[shape]} query heads, key heads, head size")
        for name, nodes in BLOCKS.items():
            report(layer_runs(name, nodes, SHAPES[shape], device, dtype), device, given.repeats)


def kernels(device: torch.device, dtype: torch.dtype, nodes: Nodes) -> dict[str, Kernel]:
    if device.type == "cpu":
        merged: dict[str, Kernel] = {"nodes": attend_nodes}
        merged |= {"library": attend_library} if dtype == torch.bfloat16 else {}
        return merged | ({"unmerged": attend_unmerged} if max(nodes[1]) >= 0 else {})
    found: dict[str, Kernel] = {"nodes": attend_nodes, "flex": attend_flex}
    if max(nodes[1]) < 0 and dtype in (torch.bfloat16, torch.float16):
        found["varlen"] = attend_varlen
    return found


def layer_runs(
    name: str, nodes: Nodes, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, str], Run]:
    num_queries, num_keys, size = heads
    generator = torch.Generator(device=device).manual_seed(0)
    query, key, value, gradient = (
        torch.randn(1, sum(nodes[0]), number, size, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for number in (num_queries, num_keys, num_keys, num_queries)
    )
    rule: dict[str, Any] = {"node_lengths": nodes[0], "node_parents": nodes[1], "rule": ScoreRule()}

    def run(kernel: Kernel) -> list[Tensor]:
        inputs = [states.detach().requires_grad_() for states in (query, key, value)]
        output = kernel(*inputs, **rule)
        return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]

    runs: dict[tuple[str, str], Run] = {
        (name, kernel): lambda attend=attend: run(attend) for kernel, attend in kernels(device, dtype, nodes).items()
    }
    return runs


def attend_library(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: list[int],
    node_parents: list[int],
    rule: ScoreRule,
) -> Tensor:
    """The heads that share keys as one head of as many times the queries, which PyTorch's kernel is faster with."""
    queries, keys, values = (states.split(node_lengths, dim=2) for states in (query, key, value))
    outputs = []
    for own, path in zip(queries, node_paths(node_parents), strict=True):
        path_keys, path_values = (torch.cat([some[node] for node in path], dim=2) for some in (keys, values))
        folded = own.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        unseen = torch.full((own.shape[2], own.shape[2]), float("-inf"), dtype=query.dtype).triu(1)
        mask = F.pad(unseen, (path_keys.shape[2] - own.shape[2], 0)).repeat(query.shape[1] // key.shape[1], 1)
        output = F.scaled_dot_product_attention(folded, path_keys, path_values, attn_mask=mask, scale=rule.scaling)
        outputs.append(output.unflatten(2, (-1, own.shape[2])).flatten(1, 2))
    return torch.cat(outputs, dim=2)


def attend_unmerged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: list[int],
    node_parents: list[int],
    rule: ScoreRule,
) -> Tensor:
    alone = [-1] * len(node_lengths)
    own = attend_nodes(query, key, value, node_lengths=node_lengths, node_parents=alone, rule=rule)
    sizes = [node_lengths[0], sum(node_lengths[1:])]
    prompt, rest = own.split(sizes, dim=2)
    seen = F.scaled_dot_product_attention(
        query.split(sizes, dim=2)[1],
        key.split(sizes, dim=2)[0],
        value.split(sizes, dim=2)[0],
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.cat([prompt, rest + seen], dim=2)


def step_runs(folder: str, device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str], Run]:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.config.use_cache = False
    runs: dict[tuple[str, str], Run] = {}
    for name, nodes in BLOCKS.items():
        batch = random_batch(nodes, device)
        for kernel, attend in kernels(device, dtype, nodes).items():
            AttentionInterface.register(f"benchmark_{kernel}", attention_of(attend))
            AttentionMaskInterface.register(f"benchmark_{kernel}", node_mask)
            runs[name, kernel] = lambda batch=batch, kernel=kernel: step(base, model, batch, kernel)
    return runs


def attention_of(attend: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
        nodes = {name: kwargs[name] for name in ("node_lengths", "node_parents")}
        output = attend(query, key, value, rule=ScoreRule(scaling=kwargs["scaling"]), **nodes)
        return output.transpose(1, 2).contiguous(), None

    return attention


def random_batch(nodes: Nodes, device: torch.device) -> dict[str, Any]:
    """A tenth of the tokens is trained, at the end of each node."""
    lengths, parents = nodes
    ids = torch.randint(1000, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)).to(device)
    is_trained = torch.cat([torch.arange(length) >= length * 9 // 10 for length in lengths]).to(device)
    return {
        "input_ids": ids,
        "labels": ids.where(is_trained, IGNORE_INDEX),
        "position_ids": torch.tensor([node_positions(lengths, parents)], device=device),
        "node_lengths": lengths,
        "node_parents": parents,
    }


def step(base: Any, model: nn.Module, batch: dict[str, Any], kernel: str) -> list[Tensor]:
    base.set_attn_implementation(f"benchmark_{kernel}")
    model.zero_grad()
    loss = token_losses(model, batch, has_logits_to_keep=has_logits_to_keep(model)).mean()
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    # B begins as zeros, so that only B has a gradient, and that of A is nothing to compare
    return [loss.detach(), *(gradient for gradient in gradients if gradient.norm() > 0)]


def report(runs: Mapping[tuple[str, str], Run], device: torch.device, repeats: int) -> None:
    print(COLUMNS)
    blocks = dict.fromkeys(block for block, _ in runs)
    for block in blocks:
        sides = {kernel: run for (name, kernel), run in runs.items() if name == block}
        expected = sides["nodes"]()
        found = {kernel: difference(run(), expected) for kernel, run in sides.items()}  # and warm
        seconds: dict[str, list[tuple[float, float]]] = {kernel: [] for kernel in sides}
        for _ in range(repeats):
            for kernel, run in sides.items():
                seconds[kernel].append(timed(run, device))
        base = medians(seconds["nodes"])
        for kernel, times in seconds.items():
            wall, cpu = medians(times)
            print(
                f"{block:<26} {kernel:<9} {wall * 1e3:>8.0f} {wall / base[0]:>6.2f} {cpu * 1e3:>8.0f} "
                f"{cpu / base[1]:>6.2f} {found[kernel]:>8.1e}",
                flush=True,
            )


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times)


def timed(run: Run, device: torch.device) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=False)
    return max((float((ours - nodes).norm() / nodes.norm()) for ours, nodes in pairs), default=float("nan"))


def described(device: torch.device, dtype: torch.dtype) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    waits = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {waits}, {dtype}, "
        f"Python {platform.python_version()}, commit {commit.strip()}"
    )


def processor() -> str:
    found: Iterator[str] = iter(())
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor())


if __name__ == "__main__":
    main()
