"""The start-up self-test: on the loaded model, packed examples have the logits of separate ones.

Which architectures keep packed examples apart cannot be read from a list, which would rot; it is tried.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.errors import ConfigError
from llm.training.tune.attention import NODE_ATTENTION, States
from llm.training.tune.nodes import node_paths, node_positions
from llm.training.tune.step_prompts import StepPrompt, lend_prompts

logger = logging.getLogger(__name__)

# A prompt of 6 tokens with two children, the second of which has a child itself, and three examples alone.
NODE_LENGTHS = [6, 5, 7, 1, 3, 4, 2]
NODE_PARENTS = [-1, -1, -1, -1, 0, 0, 5]

# Largest relative difference of a node's logits. Measured on SmolLM2-135M: one example that sees another, or a
# child that does not see its prompt, 0.19 to 0.29; rounding 6e-7 in float32, 0.02 in bfloat16.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION_TOLERANCE = 0.08


def check_isolation(model: PreTrainedModel) -> float:
    """The largest relative logit difference between packed and separate examples: rounding, or ConfigError.

    Packed twice, the second time with the prompt computed by itself (`step_prompts`). `model` uses our attention; the
    separate examples run through the model's own eager attention, so that the two ways share no code. The random ids
    come from a generator of their own: the run's seed is not touched.
    """
    ids = _random_ids(model, sum(NODE_LENGTHS))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = [*_packed_logits(model, ids), *_packed_logits(model, ids, prompt_apart=True)]
            model.set_attn_implementation("eager")
            separate = _separate_logits(model, ids)
    finally:
        model.set_attn_implementation(NODE_ATTENTION)
        model.train(was_training)
    expected = [*separate, *separate[1:]]
    difference = max(_relative_difference(a, b) for a, b in zip(packed, expected, strict=True))
    if not difference <= TOLERANCES.get(model.dtype, LOW_PRECISION_TOLERANCE):
        raise _refusal(model, f"their logits differ from those of separate examples by {difference:.2g} (relative)")
    return difference


def keeps_examples_apart(model: PreTrainedModel, *, is_packed: bool) -> bool:
    """Whether batches may be flattened: the self-test passed.

    A model that fails it is refused when a block holds several examples (`is_packed`); else it goes back to
    its own attention and trains on padded batches.
    """
    try:
        difference = check_isolation(model)
    except ConfigError as error:
        if is_packed:
            raise
        logger.info("%s The blocks hold one example each: they are trained as padded batches.", error)
        model.set_attn_implementation("eager")
        return False
    logger.info("Self-test: packed examples have the logits of separate ones (difference %.1g).", difference)
    return True


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many ids the model has an embedding for."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


def _random_ids(model: PreTrainedModel, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(model), (num_tokens,), generator=generator).to(model.device)


def _packed_logits(model: PreTrainedModel, ids: Tensor, *, prompt_apart: bool = False) -> Sequence[Tensor]:
    """The logits of each node; with `prompt_apart` of all but the first, which is then computed by itself."""
    positions = torch.tensor(node_positions(NODE_LENGTHS, NODE_PARENTS), device=ids.device)
    first, states = (1, _prompt_states(model, ids[: NODE_LENGTHS[0]])) if prompt_apart else (0, [])
    start = sum(NODE_LENGTHS[:first])
    try:
        logits = model(
            input_ids=ids[None, start:],
            position_ids=positions[None, start:],
            node_lengths=NODE_LENGTHS,
            node_parents=NODE_PARENTS,
            prompt_states=states,
            use_cache=False,
        ).logits[0]
    # a forward without these arguments, or one that does not hand them on
    except (TypeError, ValueError) as error:
        raise _refusal(model, f"its forward fails on them: {error}") from error
    nodes: Sequence[Tensor] = logits.float().split(NODE_LENGTHS[first:])
    return nodes


def _prompt_states(model: PreTrainedModel, ids: Tensor) -> list[States]:
    prompt = StepPrompt(ids[None])
    prompt.num_batches = 1
    states: list[States] = lend_prompts({"prompts": [prompt]}, model)["prompt_states"]  # as in training
    return states


def _separate_logits(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """One row a path, as long as the longest: what stands behind a path, its tokens cannot see."""
    nodes, paths = ids.split(NODE_LENGTHS), node_paths(NODE_PARENTS)
    rows = [torch.cat([nodes[node] for node in path]) for path in paths]
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = torch.arange(batch.shape[1], device=ids.device).expand_as(batch)
    logits = model(input_ids=batch, position_ids=positions, use_cache=False).logits.float()
    ends = [len(row) for row in rows]
    return [row[end - length : end] for row, end, length in zip(logits, ends, NODE_LENGTHS, strict=True)]


def _relative_difference(packed: Tensor, separate: Tensor) -> float:
    return float((packed - separate).norm() / separate.norm())


def _refusal(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"base_model: `{model.config.model_type}` ({type(model).__name__}) does not keep packed examples apart: "
        f"{reason}. Prepare the data with `pack: false` in dataprep.yaml, or choose another base model."
    )
