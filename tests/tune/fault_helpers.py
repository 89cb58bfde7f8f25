"""What the fault tests share: a tiny training that gives the same bits each time, and an S3 server that
fails.
"""

import hashlib
import multiprocessing
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.whole_folder import write_folder_manifest

VOCABULARY = 97
# Faults are random: 1 is quick; a note on issue 6 has the numbers of a longer series.
REPEAT = int(os.environ.get("LLM_TRAIN_REPEAT_FAULTS", "1"))


def tiny_model(*, is_lora: bool = True) -> LlamaForCausalLM | PeftModel:
    """A Llama of 2 layers with dropout, the same weights each time."""
    torch.set_num_threads(1)  # threads only wait for one another at this size
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        attention_dropout=0.1,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    if not is_lora:
        return model
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.1)
    with warnings.catch_warnings():
        # peft 0.21 reads a name that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        return get_peft_model(model, lora)


def tiny_rows(number: int = 24) -> list[dict[str, list[int]]]:
    """Rows of random ids that are their own labels."""
    ids = torch.randint(3, VOCABULARY, (number, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def tiny_trainer(output: Path, *, callbacks: list[TrainerCallback], is_lora: bool = True, **arguments: Any) -> Trainer:
    """A Trainer of 12 steps that saves every 3; `arguments` go to TrainingArguments."""
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_total_limit": None,
    } | arguments
    return Trainer(
        model=tiny_model(is_lora=is_lora),
        args=TrainingArguments(output_dir=str(output), **settings),
        train_dataset=tiny_rows(),
        eval_dataset=tiny_rows(8),
        data_collator=collate,
        callbacks=callbacks,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of the trained weights, to the bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def train(output: Path, resume: str | None = None, **settings: Any) -> str:
    """The digest of the weights after a training to the end."""
    trainer = tiny_trainer(output, callbacks=[CheckpointCallback()], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return weights_digest(trainer.model)


def whole_folder(folder: Path, files: dict[str, bytes], **facts: Any) -> Path:
    """A folder of these files, whole."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_folder_manifest(str(folder), **facts)
    return folder


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens <s>, </s>, <pad> and <|end|>."""
    specials = ["<pad>", "<s>", "</s>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|end|>"],
    )
    fast.chat_template = chat_template
    return fast


class FailingProxy:
    """An HTTP server on this machine that passes requests on to `target`, unless `fails(method, path)` says
    how not.

    `fails` gives None (pass on), a status such as 503, or "reset" (the connection is closed without an
    answer).
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.fails: Callable[[str, str], int | str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.num_failed = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["FailingProxy"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def reset(self) -> None:
        """Passes all on again and forgets the past."""
        self.fails = lambda method, path: None
        self.requests = []
        self.num_failed = 0


def fail_at_random(share: float, seed: int) -> Callable[[str, str], int | str | None]:
    """500, 503 or a reset for this share of all requests."""
    generator = random.Random(seed)
    return lambda method, path: generator.choice([500, 503, "reset"]) if generator.random() < share else None


def _handler(proxy: FailingProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def handle_any(self) -> None:
            _answer(proxy, self)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


def _answer(proxy: FailingProxy, request: BaseHTTPRequestHandler) -> None:
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    proxy.requests.append((request.command, request.path))
    failure = proxy.fails(request.command, request.path)
    if failure == "reset":
        proxy.num_failed += 1
        request.close_connection = True
        return
    if failure is not None:
        proxy.num_failed += 1
        status, headers, content = int(failure), {}, _s3_error(int(failure))
    else:
        status, headers, content = _pass_on(proxy.target, request, body)
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    if request.command != "HEAD":
        request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def _s3_error(status: int) -> bytes:
    code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()


def _pass_on(
    target: tuple[str, int], request: BaseHTTPRequestHandler, body: bytes
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection(*target)
    connection.request(request.command, request.path, body, dict(request.headers))
    response = connection.getresponse()
    content = response.read()
    hidden = {"transfer-encoding", "connection", "date", "server"}
    hidden |= set() if request.command == "HEAD" else {"content-length"}
    headers = {name: value for name, value in response.getheaders() if name.lower() not in hidden}
    connection.close()
    return response.status, headers, content


def wait_until(is_true: Callable[[], bool]) -> None:
    """Returns when the condition holds; an AssertionError after two minutes."""
    for _ in range(12_000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError("what the test waits for did not come")


# A forked child of this server has the libraries loaded already: it starts in 0.1 s instead of 5.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "transformers.trainer", "peft", "accelerate"])


@contextmanager
def running_process(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that runs `target(*arguments)`; killed at the end if it still runs."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def join_ranks(rank: int, port: int) -> dict[str, Any]:
    """Makes this process one of two ranks; what TrainingArguments need for it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}


def free_port() -> int:
    """A port of this machine that is free just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def mirror_of(output: Path) -> Path:
    """Where `resume_and_train` copies `output` to."""
    return output.with_name(f"{output.name}-mirror")


def resume_and_train(output: Path, settings: dict[str, Any]) -> None:
    """What `finetune` does, small; the file `digest` holds the hash of the result."""
    with OutputSync(str(output), [str(mirror_of(output))]) as mirror:
        trainer = tiny_trainer(output, callbacks=[CheckpointCallback(mirror=mirror)], **settings)
        trainer.train(mirror.restore())
        (output / "digest.tmp").write_text(weights_digest(trainer.model))
        (output / "digest.tmp").replace(output / "digest")
