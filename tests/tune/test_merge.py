"""A merged adapter is one whole model that answers as the adapter on its base did."""

import os
from pathlib import Path

import pytest
import torch
from fault_helpers import tiny_model, tiny_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from llm.cli import app
from llm.errors import CheckpointError, ConfigError
from llm.training.tune.export import export_model
from llm.training.tune.merge import merge_adapter
from llm.training.tune.whole_folder import find_damage

IDS = torch.tensor([[1, 5, 9, 3, 44]])


def trained_adapter(base: Path, *, tie: bool = False, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapter with weights that are not zero on a base in `base`; with `tie` it trains the embeddings too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        tie_word_embeddings=tie, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(base)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"] if tie else None,
        ensure_weight_tying=tie,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    return model


def exported(folder: Path, model: PeftModel, base: str) -> Path:
    return Path(export_model(model, tiny_tokenizer(), None, local_output=str(folder), base_model=base, run={}))


@pytest.mark.parametrize("tie", [False, True], ids=["plain", "tied"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merged_model_gives_the_logits_of_the_adapter(tie: bool, tmp_path: Path) -> None:
    model = trained_adapter(tmp_path / "base", tie=tie)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    final_output = exported(tmp_path / "out", model, str(tmp_path / "base"))
    merged = merge_adapter(str(final_output), str(tmp_path / "deep" / "merged") + "/")
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (loaded(IDS).logits - base(IDS).logits).abs().max() > 0.1
    assert os.listdir(tmp_path / "deep") == ["merged"]


def test_merged_folder_is_whole_and_has_the_files_of_final_output(tmp_path: Path) -> None:
    model = trained_adapter(tmp_path / "base", dtype=torch.bfloat16)
    model.get_base_model().generation_config.eos_token_id = [7, 2]
    final_output = exported(tmp_path, model, "org/base")
    merged = Path(merge_adapter(str(final_output), str(tmp_path / "merged"), base_model=str(tmp_path / "base")))
    assert find_damage(str(merged)) is None
    same = {"generation_config.json", "run.json", "tokenizer.json", "tokenizer_config.json"}
    names = {path.name for path in merged.iterdir()}
    assert names == same | {"config.json", "model.safetensors", "README.md", "manifest.json"}
    assert all((merged / name).read_bytes() == (final_output / name).read_bytes() for name in same)
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [7, 2]
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16  # as the base is stored
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tiny_tokenizer().get_vocab()


def test_merge_refuses_what_it_cannot_merge(tmp_path: Path) -> None:
    adapter = exported(tmp_path / "adapter", trained_adapter(tmp_path / "base"), str(tmp_path / "gone"))
    whole = export_model(
        tiny_model(is_lora=False), tiny_tokenizer(), None, local_output=str(tmp_path / "full"), base_model="b", run={}
    )
    target = str(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds no adapter: it is a whole model already"):
        merge_adapter(whole, target)
    with pytest.raises(CheckpointError, match=r"is not whole: no manifest.json"):
        merge_adapter(str(tmp_path), target)
    with pytest.raises(CheckpointError, match=r"`.*base` exists already"):
        merge_adapter(str(adapter), str(tmp_path / "base"))
    with pytest.raises(ConfigError, match="gone"):
        merge_adapter(str(adapter), target)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has 1 bytes"):
        merge_adapter(str(adapter), target)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "full"]


def test_merge_command_takes_the_base_model_and_tells_where_the_model_is(tmp_path: Path) -> None:
    final_output = exported(tmp_path, trained_adapter(tmp_path / "base"), "org/base")
    arguments = ["merge", str(final_output), str(tmp_path / "merged")]
    assert CliRunner().invoke(app, [*arguments, "--base-model", str(tmp_path / "base")]).exit_code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert CliRunner().invoke(app, arguments).exit_code == 4


def test_peft_still_ignores_the_generation_config_of_an_adapter(tmp_path: Path) -> None:
    """When this fails, the line about it may leave the README of an adapter."""
    model = trained_adapter(tmp_path / "base")
    model.get_base_model().generation_config.eos_token_id = [7, 2]
    final_output = exported(tmp_path, model, str(tmp_path / "base"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(final_output)
    assert loaded.get_base_model().generation_config.eos_token_id == 2
