"""Our attention and its self-test: packed examples do not touch, on every architecture, and what leaks is
refused."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, REFUSED, VOCAB_SIZE, make_model
from transformers import PreTrainedModel

from llm.errors import ConfigError
from llm.training.tune import isolation, node_sdpa
from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.isolation import check_isolation, keeps_examples_apart
from llm.training.tune.nodes import node_paths, node_positions


def packed_logits(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int], parents: list[int]) -> torch.Tensor:
    positions = torch.tensor([node_positions(lengths, parents)])
    with torch.no_grad():
        output = model(
            input_ids=ids[None],
            position_ids=positions,
            node_lengths=lengths,
            node_parents=parents,
            use_cache=False,
        )
    return output.logits[0]


def path_logits(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int], parents: list[int]) -> torch.Tensor:
    """The logits of each node from its path alone, through eager attention, one forward a path."""
    nodes = ids.split(lengths)
    model.set_attn_implementation("eager")
    found = []
    for path in node_paths(parents):
        row = torch.cat([nodes[node] for node in path])
        with torch.no_grad():
            found.append(model(input_ids=row[None], use_cache=False).logits[0, -lengths[path[-1]] :])
    model.set_attn_implementation(NODE_ATTENTION)
    return torch.cat(found)


@st.composite
def forests(draw: Any) -> tuple[list[int], list[int]]:
    count = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return lengths, [draw(st.integers(-1, node - 1)) for node in range(count)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forest=forests())
def test_logits_of_any_forest_equal_those_of_separate_paths(
    architecture: str, forest: tuple[list[int], list[int]]
) -> None:
    lengths, parents = forest
    model = make_model(architecture)
    ids = torch.randint(3, VOCAB_SIZE, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    packed = packed_logits(model, ids, lengths, parents)
    torch.testing.assert_close(packed, path_logits(model, ids, lengths, parents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ([30, 1, 1], [-1, -1, 0]),
        ([4, 3, 2, 1], [-1, 0, 1, 2]),
        ([8, 5, 6, 7, 1], [-1, 0, 0, 0, 0]),
    ],
    ids=["single tokens", "chain", "star"],
)
def test_logits_of_named_shapes_equal_those_of_separate_paths(lengths: list[int], parents: list[int]) -> None:
    for architecture in ("gemma2", "gemma3_text", "qwen2", "llama"):
        model = make_model(architecture)
        ids = torch.arange(3, 3 + sum(lengths))
        packed = packed_logits(model, ids, lengths, parents)
        torch.testing.assert_close(packed, path_logits(model, ids, lengths, parents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_self_test_passes_for_supported_models(architecture: str) -> None:
    model = make_model(architecture).train()
    assert check_isolation(model) < 1e-5
    assert model.training
    assert model.config._attn_implementation == NODE_ATTENTION


@pytest.mark.parametrize("architecture", REFUSED)
def test_self_test_refuses_what_leaks_and_says_what_helps(architecture: str) -> None:
    model = make_model(architecture)
    with pytest.raises(ConfigError, match=f"`{architecture}`.*") as caught:
        check_isolation(model)
    assert "pack: false" in str(caught.value) or "another base model" in str(caught.value)


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_model_trains_on_unpacked_blocks_only(architecture: str) -> None:
    model = make_model(architecture)
    with pytest.raises(ConfigError):
        keeps_examples_apart(model, is_packed=True)
    assert keeps_examples_apart(model, is_packed=False) is False
    rows = torch.arange(3, 13).view(2, 5)
    assert torch.isfinite(model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits).all()


def test_self_test_sees_a_leak_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky_paths(parents: list[int]) -> list[list[int]]:
        paths = node_paths(parents)
        if len(paths) > 1:
            paths[2] = [1, 2]  # an example sees the one before it
        return paths

    monkeypatch.setattr(node_sdpa, "node_paths", leaky_paths)
    with pytest.raises(ConfigError, match="`llama`.*differ from those of separate examples by [01]"):
        check_isolation(make_model("llama"))


def test_self_test_leaves_the_random_state_alone() -> None:
    model = make_model("llama")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_isolation(model)
    assert torch.equal(before, torch.get_rng_state())


def test_packed_row_without_node_structure_is_an_error() -> None:
    with pytest.raises(ValueError, match="these position_ids restart"):
        make_model("llama")(
            input_ids=torch.arange(3, 9)[None],
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]),
            use_cache=False,
        )


@pytest.mark.parametrize("num_padding", [0, 4])
def test_generation_with_our_attention_equals_that_with_sdpa(num_padding: int) -> None:
    model, prompt = make_model("qwen2"), torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(prompt)
    mask[0, :num_padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    ours = model.generate(prompt, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(prompt, **options))


def test_sinks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="`gpt_oss` computes its attention with s_aux"):
        check_isolation(make_model("gpt_oss"))


def test_window_that_attention_is_not_told_is_refused() -> None:
    model = make_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ConfigError, match="`qwen2`.*a window that its attention function is not told"):
        check_isolation(model)


def test_low_precision_is_told_from_a_leak() -> None:
    model = make_model("llama").to(torch.bfloat16)
    assert check_isolation(model) < isolation.LOW_PRECISION_TOLERANCE


def test_node_paths_and_positions_of_the_example_in_the_docs() -> None:
    assert node_paths([-1, 0, 0, 2]) == [[0], [0, 1], [0, 2], [0, 2, 3]]
    assert node_positions([4, 2, 3], [-1, 0, 0]) == [0, 1, 2, 3, 4, 5, 4, 5, 6]
