"""`final_output` behind `transformers serve`, asked by the `openai` client: trained prompts, and it stops by itself."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from datasets import load_from_disk
from openai import APIConnectionError, OpenAI
from openai.types.chat import ChatCompletion
from tiny_models import make_model
from transformers import AutoTokenizer

from llm.training.config import FinetuneConfig
from llm.training.finetune import finetune
from llm.training.tune.merge import merge_adapter
from llm.training.tune.nodes import node_paths

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 100  # an answer has at most 14
END = 4  # <|im_end|>
SYSTEM = "Answer {briefly}, 1 line."
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "modules_to_save": ["lm_head"]}
ROWS: list[dict[str, Any]] = [
    {"input": "2+2?", "response": "4", "contexts": []},
    {"input": "Is 9 prime?", "response": "No: 9 = 3 * 3.", "contexts": ["9 is a square.", " It is {odd}.\n"]},
    {"input": "  Wie geht's? 👍🏽\n", "response": " Gut, danke.\n", "contexts": []},
    {"input": "Sum?", "response": '{"sum": 12}', "contexts": ["5 and 7"]},
]

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is stored of one row: the ids before the first label, and the labels."""

    prompt: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, and the file into which it writes the ids that a model reads."""

    client: OpenAI
    ids: Path

    def ask(self, model: Path, row: dict[str, Any], **settings: Any) -> tuple[ChatCompletion, list[int], list[int]]:
        """The answer, the prompt ids and the ids of the answer that the model read."""
        self.ids.write_text("")
        answer = self.client.chat.completions.create(
            model=str(model),
            messages=[*settings.pop("before", []), {"role": "user", "content": row["input"]}],
            extra_body={"chat_template_kwargs": {"documents": [{"text": text} for text in row["contexts"]]}},
            max_tokens=MAX_TOKENS,
            **settings,
        )
        prompt, *steps = [json.loads(line) for line in self.ids.read_text().splitlines()]
        return answer, prompt, [number for step in steps for number in step]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows in `train`, and `final_output` of both kinds in `adapter`, `whole`."""
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    # It stops at </s> and knows nothing of the stop that is trained, <|im_end|>.
    make_model(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1).save_pretrained(
        folder / "base"
    )
    prepare_rows(folder)
    for name, lora_config in (("adapter", LORA), ("whole", None)):
        train(folder, name, lora_config)
    merge_adapter(str(folder / "adapter" / "final_output"), str(folder / "merged"))
    return folder


def prepare_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    example = {"input": "1+1?", "response": "2", "contexts": ["Sums."]}
    prompt = {"system_message": SYSTEM, "input_template": "Q: {text}", "context_template": "Source {index}: {text}"}
    config = {
        "source_config": str(folder / "rows.jsonl"),
        "base_model": str(folder / "base"),
        "prompt_config": {"method": "Prompt", "kwargs": prompt | {"examples": [example]}},
        "prompt_format_config": {"method": "ChatMLFormat"},
        "dataset_writer_config": {"method": "save_to_disk", "kwargs": {"dataset_path": str(folder / "train")}},
        "chunksize": 512,
    }
    (folder / "dataprep.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, str(ROOT / "llm" / "training" / "dataprep.py"), str(folder / "dataprep.yaml")]
    subprocess.run(command, check=True, capture_output=True)


def train(folder: Path, name: str, lora_config: dict[str, Any] | None) -> None:
    arguments = {
        "max_steps": 120,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.02,
        "warmup_steps": 10,
        "logging_steps": 40,
        "save_steps": 1000,
    }
    settings = {
        "base_model": str(folder / "base"),
        "train_dataset_config": str(folder / "train"),
        "local_output": str(folder / name),
        "lora_config": lora_config,
        "torch_dtype": "float32",
        "report_to": "none",
        "training_arguments": arguments,
    }
    summary = finetune(FinetuneConfig.model_validate(settings))
    assert summary.last_loss is not None and summary.last_loss < 0.1


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[Trained]:
    """What is stored, in the order of the rows."""
    found: dict[int, Trained] = {}
    for block in load_from_disk(str(folder / "train")):
        parents = block["node_parents"]
        starts = [0, *accumulate(block["node_lengths"])]
        ends = [path for path in node_paths(parents) if path[-1] not in parents]  # where an example ends
        for row, path in zip(block["example_rows"], ends, strict=True):
            places = [place for node in path for place in range(starts[node], starts[node + 1])]
            ids, labels = ([block[name][place] for place in places] for name in ("input_ids", "labels"))
            prompt = next(n for n, label in enumerate(labels) if label != -100)
            found[row] = Trained(prompt=ids[:prompt], labels=labels[prompt:])
    assert sorted(found) == list(range(len(ROWS)))
    return [found[row] for row in sorted(found)]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ids = folder / "ids.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("serve_with_ids.py")), str(ids)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "serve", "--host", "127.0.0.1", "--port", port, "--device", "cpu"], stdout=log, stderr=log
        )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait_until_up(process, client, folder / "server.log")
        yield Server(client=client, ids=ids)
    finally:
        client.close()
        process.terminate()
        process.wait(30)


def wait_until_up(process: subprocess.Popen[bytes], client: OpenAI, log: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.get("/../health", cast_to=object)
            return
        except APIConnectionError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def generated(folder: Path, prompt: list[int]) -> str:
    """What `generate` gives for the model that is loaded as the folder's README says."""
    import torch

    names: dict[str, Any] = {"this_folder": str(folder)}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    output = names["model"].generate(input_ids=torch.tensor([prompt]), max_new_tokens=MAX_TOKENS)
    text: str = names["tokenizer"].decode(output[0, len(prompt) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize(
    ("served", "final_output"),
    [("merged", "adapter/final_output"), ("whole/final_output", "whole/final_output")],
    ids=["adapter", "whole"],
)
def test_served_model_reads_the_trained_prompts_and_stops_by_itself(
    served: str, final_output: str, folder: Path, trained: list[Trained], server: Server
) -> None:
    for row, stored in zip(ROWS, trained, strict=True):
        answer, prompt, read = server.ask(folder / served, row)
        assert prompt == stored.prompt
        assert read == stored.labels[:-1]  # the model never reads its own stop token
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(stored.labels))
        assert answer.choices[0].finish_reason == "stop"
        text = answer.choices[0].message.content
        assert text == row["response"] == generated(folder / final_output, prompt)


def test_trained_prompt_goes_with_a_system_message_that_says_the_same(
    folder: Path, trained: list[Trained], server: Server
) -> None:
    model = folder / "whole" / "final_output"
    for content, is_trained in ((SYSTEM, True), ("Talk!", False)):
        _, prompt, _ = server.ask(model, ROWS[1], before=[{"role": "system", "content": content}])
        assert (prompt == trained[1].prompt) is is_trained
    assert "Talk!" in AutoTokenizer.from_pretrained(model).decode(prompt)


def test_streamed_answer_is_the_same(folder: Path, server: Server) -> None:
    pieces = server.client.chat.completions.create(
        model=str(folder / "merged"), messages=[{"role": "user", "content": ROWS[0]["input"]}], stream=True
    )
    choices = [piece.choices[0] for piece in pieces]
    assert "".join(choice.delta.content or "" for choice in choices) == ROWS[0]["response"]
    assert choices[-1].finish_reason == "stop"


def test_readme_asks_the_server(folder: Path, server: Server) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Serve it\n")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    code = code.replace("http://127.0.0.1:8000/v1", str(server.client.base_url))
    code = code.replace("output/quickstart/merged", str(folder / "merged"))
    names: dict[str, Any] = {"question": ROWS[1]["input"], "contexts": ROWS[1]["contexts"]}
    exec(code, names)
    assert names["answer"].choices[0].message.content == ROWS[1]["response"]
    names["client"].close()


def test_control_text_of_a_request_becomes_control_tokens(folder: Path, server: Server) -> None:
    """Unlike in training, where it stays text (README, "Serve it"): the server hands one text to its tokenizer."""
    counts = []
    for text in ("Hi", "Hi<|im_end|>"):
        _, prompt, _ = server.ask(folder / "merged", {"input": text, "contexts": []})
        counts.append(prompt.count(END))
    assert counts[1] == counts[0] + 1
