"""`final_output` is whole, says what was trained, and makes the trained prompt."""

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_helpers import VOCABULARY, running_process, tiny_model, tiny_tokenizer, weights_digest
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm.errors import CheckpointError
from llm.training.prep.manifest import Manifest, Sample
from llm.training.tune.export import export_model
from llm.training.tune.whole_folder import find_damage

TEMPLATE = (
    "{% for document in documents or [] %}[{{ document['text'] }}] {% endfor %}"
    "{% for message in messages %}user: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


def sample(text: str = "Who?", contexts: tuple[str, ...] = ("a", "b")) -> Sample:
    rendered = "".join(f"[{context}] " for context in contexts) + f"user: {text}\nanswer:"
    ids = tiny_tokenizer()(rendered, add_special_tokens=False)["input_ids"]
    return Sample(messages=[{"role": "user", "content": text}], contexts=list(contexts), tools=[], prompt_ids=ids)


def manifest(**changes: Any) -> Manifest:
    facts = Manifest(
        format_version=1,
        base_model="org/base",
        tokenizer_fingerprint="f",
        prompt={},
        prompt_format={},
        chat_template=TEMPLATE,
        stop_token="<|end|>",
        stop_token_id=3,
        samples=[sample(), sample("Where?", ())],
        source={},
        counts={"rows_read": 2},
        chunksize=64,
        ignore_index=-100,
        seed=None,
        versions={},
    )
    return replace(facts, **changes)


def export(output: Path, data: Manifest | None = None, *, is_lora: bool = True, tokenizer: Any = None) -> Path:
    path = export_model(
        tiny_model(is_lora=is_lora),
        tokenizer or tiny_tokenizer(),
        data or manifest(),
        local_output=str(output),
        base_model="org/base",
        run={"config": {"base_model": "org/base"}},
    )
    return Path(path)


def test_exported_adapter_holds_all_that_inference_needs(tmp_path: Path) -> None:
    folder = export(tmp_path)
    assert folder == tmp_path / "final_output"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "manifest.json",
        "README.md",
        "run.json",
        "finetune.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert find_damage(str(folder)) is None
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert os.listdir(tmp_path) == ["final_output"]


def test_exported_adapter_loads_with_the_trained_weights(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(is_lora=False).save_pretrained(base)
    model = tiny_model()
    folder = export_model(model, tiny_tokenizer(), None, local_output=str(tmp_path), base_model=str(base), run={})
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert weights_digest(loaded) == weights_digest(model)


def test_exported_full_model_loads_with_the_trained_weights(tmp_path: Path) -> None:
    folder = export(tmp_path, is_lora=False)
    assert weights_digest(AutoModelForCausalLM.from_pretrained(folder)) == weights_digest(tiny_model(is_lora=False))


def test_exported_chat_template_gives_the_trained_prompt(tmp_path: Path) -> None:
    given = tiny_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(export(tmp_path, tokenizer=given))
    for row in manifest().samples:
        documents = [{"text": context} for context in row.contexts] or None
        ids = tokenizer.apply_chat_template(
            row.messages, documents=documents, add_generation_prompt=True, return_dict=False
        )
        assert ids == row.prompt_ids
    assert given.chat_template is None  # the caller's is left alone


def test_other_chat_template_is_refused_with_both_sides(tmp_path: Path) -> None:
    data = manifest(chat_template=TEMPLATE.replace("answer:", "Answer:"))
    with pytest.raises(CheckpointError, match=r"'Who\?'.*'Answer:'.*in training it was 'answer:'"):
        export(tmp_path, data)
    assert os.listdir(tmp_path) == []


def test_every_sample_is_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"for the input 'Where\?', does not give the prompt that was trained"):
        export(tmp_path, manifest(samples=[sample(), replace(sample("Where?", ()), prompt_ids=[1, 2])]))


def test_longer_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"' ' \(ids \[\d+\]\), in training it was the end"):
        export(tmp_path, manifest(chat_template=TEMPLATE.replace("answer:", "answer: ")))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no documents') }}", "{% for %}"])
def test_template_that_gives_no_prompt_is_refused(tmp_path: Path, template: str | None) -> None:
    with pytest.raises(CheckpointError, match="gives no prompt"):
        export(tmp_path, manifest(chat_template=template))


def test_generation_config_stops_at_the_trained_token_without_sampling_warnings(tmp_path: Path) -> None:
    model = tiny_model()
    own = model.get_base_model().generation_config
    own.eos_token_id, own.temperature, own.top_p, own.do_sample = [2, 3], 0.6, 0.9, False
    own.pad_token_id = None
    folder = export_model(
        model, tiny_tokenizer(TEMPLATE), manifest(), local_output=str(tmp_path), base_model="org/base", run={}
    )
    config = GenerationConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id, config.temperature) == ([3, 2], 0, None)
    config.validate(strict=True)
    assert own.temperature == 0.6  # the model's is left alone


def test_generation_config_keeps_sampling_that_the_base_asks_for(tmp_path: Path) -> None:
    model = tiny_model()
    own = model.get_base_model().generation_config
    own.temperature, own.do_sample = 0.6, True
    folder = export_model(model, tiny_tokenizer(), None, local_output=str(tmp_path), base_model="org/base", run={})
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6


def test_run_record_holds_config_data_and_versions(tmp_path: Path) -> None:
    record = json.loads((export(tmp_path) / "run.json").read_text())
    assert record["config"] == {"base_model": "org/base"} and record["base_model"] == "org/base"
    assert record["data"]["counts"] == {"rows_read": 2}
    assert record["versions"]["transformers"]


def test_readme_has_no_placeholders(tmp_path: Path) -> None:
    text = (export(tmp_path) / "README.md").read_text()
    assert "More Information Needed" not in text and "org/base" in text and len(text.splitlines()) < 30


@pytest.mark.parametrize("is_lora", [True, False], ids=["adapter", "whole"])
def test_model_loaded_as_the_readme_says_stops_at_the_trained_token(
    is_lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(is_lora=False).save_pretrained(tmp_path / "base")  # it stops at token 2 only
    model = tiny_model(is_lora=is_lora)
    path = export_model(
        model,
        tiny_tokenizer(TEMPLATE),
        manifest(),
        local_output=str(tmp_path),
        base_model=str(tmp_path / "base"),
        run={},
    )
    loading, asking = re.findall(r"```python\n(.*?)```", (Path(path) / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"this_folder": path, "question": "a"}
    exec(loading, names)
    answering = SimpleNamespace(generate=lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[7, 3]])], dim=1))
    exec(asking, names | {"model": answering})  # the tiny model does not know all ids of this tokenizer
    assert capsys.readouterr().out.strip() == names["tokenizer"].decode([7])
    assert names["tokenizer"].chat_template == TEMPLATE
    assert names["model"].generation_config.eos_token_id == [3, 2]
    forced = torch.full((1, VOCABULARY), -1e9).index_fill(1, torch.tensor([3]), 0.0)  # as if it answered "stop"
    output = names["model"].generate(
        input_ids=torch.tensor([[5, 6]]), max_new_tokens=5, logits_processor=[lambda ids, scores: forced]
    )
    assert output.tolist() == [[5, 6, 3]]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = export(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def test_older_final_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = export(tmp_path, is_lora=False)
    (folder / "left-over.bin").write_text("x")
    (tmp_path / ".final_output.tmp").mkdir()  # of a run that was killed
    export(tmp_path)
    assert os.listdir(tmp_path) == ["final_output"]
    assert not (folder / "left-over.bin").exists() and not (folder / "model.safetensors").exists()
    assert find_damage(str(folder)) is None


def export_often(output: Path) -> None:
    for _ in range(8):
        export(output)


def watch(folder: Path) -> str | None:
    """Reads `folder` through one handle: "whole", or why not; None when absent or replaced meanwhile."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        damage = find_damage(f"/proc/self/fd/{handle}")
        is_there = folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino
        return (damage or "whole") if is_there or not damage else None
    except FileNotFoundError:  # replaced between two looks
        return None
    finally:
        os.close(handle)


def test_watcher_never_sees_a_torn_final_output(tmp_path: Path) -> None:
    seen = []
    with running_process(export_often, tmp_path) as process:
        while process.is_alive():
            seen.append(watch(tmp_path / "final_output"))
        assert process.exitcode == 0
    assert set(seen) - {None} == {"whole"}
    assert seen.count("whole") > 8
