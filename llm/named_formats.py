"""The prompt formats known by name, each equal to the template that its model family published.

The source of each template stands beside it; `tests/test_named_formats.py` holds the expected texts.
"""

from dataclasses import dataclass

from llm.prompt_format import PromptFormat, Role


def _verbatim(prefix: str = "", suffix: str = "") -> Role:
    """A role whose text the published template leaves as it is."""
    return Role(prefix, suffix, strip_text=False)


@dataclass(frozen=True)
class PlainFormat(PromptFormat):
    """No marks at all: for base models and prompts whose templates say who speaks."""


@dataclass(frozen=True)
class UserAssistantFormat(PromptFormat):
    """`User: ...` and `Assistant: ...`, a line each."""

    input: Role = Role("User: ")
    response: Role = Role("Assistant: ")


@dataclass(frozen=True)
class RedpajamaFormat(PromptFormat):
    """togethercomputer/RedPajama-INCITE-7B-Chat, model card."""

    input: Role = Role("<human>: ")
    response: Role = Role("<bot>: ")


@dataclass(frozen=True)
class VicunaFormat(PromptFormat):
    """lm-sys/FastChat `fastchat/conversation.py`, template vicuna_v1.1 (its BOS comes from the tokenizer)."""

    input: Role = _verbatim("USER: ")
    response: Role = _verbatim("ASSISTANT: ")
    system: Role = _verbatim()
    role_separator: str = " "
    turn_separator: str | None = ""
    BOS: str = "<s>"
    EOS: str = "</s>"
    default_system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )


@dataclass(frozen=True)
class Llama2Format(PromptFormat):
    """meta-llama/llama `llama/generation.py` (chat_completion): every round is a sequence of its own."""

    input: Role = Role("[INST] ", " [/INST]")
    system: Role = _verbatim("<<SYS>>\n", "\n<</SYS>>\n")
    response: Role = Role(" ", " ")
    nested_system: bool = True
    role_separator: str = ""
    BOS: str = "<s>"
    repeat_BOS: bool = True
    EOS: str = "</s>"


@dataclass(frozen=True)
class TogetherLlama2Format(PromptFormat):
    """togethercomputer/Llama-2-7B-32K-Instruct, model card."""

    input: Role = Role("[INST]\n", "\n[/INST]\n\n")
    nested_system: bool = True
    role_separator: str = ""


@dataclass(frozen=True)
class Llama3Format(PromptFormat):
    """meta-llama/Meta-Llama-3-8B-Instruct, `chat_template` of its tokenizer."""

    input: Role = Role("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
    response: Role = Role("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
    system: Role = Role("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")
    role_separator: str = ""
    BOS: str = "<|begin_of_text|>"


@dataclass(frozen=True)
class MistralV1Format(PromptFormat):
    """mistralai/Mistral-7B-Instruct-v0.2 (and v0.1), `chat_template` of its tokenizer.

    The space before `[INST]` gives the ids of mistral-common (instruct tokenizer v1): it tokenizes each turn apart,
    and SentencePiece begins a text with a space.
    """

    input: Role = _verbatim(" [INST] ", " [/INST]")
    response: Role = _verbatim(" ")
    system: Role = _verbatim()
    nested_system: bool = True
    role_separator: str = ""
    content_separator: str = "\n\n"
    BOS: str = "<s>"
    EOS: str = "</s>"


@dataclass(frozen=True)
class MistralFormat(MistralV1Format):
    """mistralai/Mistral-7B-Instruct-v0.3, `chat_template` of its tokenizer; the marks are control tokens."""

    input: Role = _verbatim("[INST] ", "[/INST]")
    response: Role = Role(" ")
    system_in_last_input: bool = True


@dataclass(frozen=True)
class ChatMLFormat(PromptFormat):
    """OpenAI's Chat Markup Language, as in Qwen, SmolLM2, Yi and many others."""

    input: Role = _verbatim("<|im_start|>user\n", "<|im_end|>")
    response: Role = _verbatim("<|im_start|>assistant\n", "<|im_end|>")
    system: Role = _verbatim("<|im_start|>system\n", "<|im_end|>")


@dataclass(frozen=True)
class SmolLM2Format(ChatMLFormat):
    """HuggingFaceTB/SmolLM2-135M-Instruct, `chat_template` of its tokenizer: ChatML, always a system message."""

    default_system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class QwenFormat(ChatMLFormat):
    """Qwen/Qwen2.5-7B-Instruct, `chat_template` of its tokenizer: ChatML with a system message always."""

    default_system: str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class GemmaFormat(PromptFormat):
    """google/gemma-2-2b-it, `chat_template` of its tokenizer; a system message stands where Gemma 3 has it."""

    input: Role = Role("<start_of_turn>user\n", "<end_of_turn>")
    response: Role = Role("<start_of_turn>model\n", "<end_of_turn>")
    nested_system: bool = True
    content_separator: str = "\n\n"
    BOS: str = "<bos>"


@dataclass(frozen=True)
class PhiFormat(PromptFormat):
    """microsoft/Phi-3-mini-4k-instruct, `chat_template` of its tokenizer."""

    input: Role = _verbatim("<|user|>\n", "<|end|>")
    response: Role = _verbatim("<|assistant|>\n", "<|end|>")
    system: Role = _verbatim("<|system|>\n", "<|end|>")


@dataclass(frozen=True)
class ZephyrFormat(PromptFormat):
    """HuggingFaceH4/zephyr-7b-beta, `chat_template` of its tokenizer."""

    input: Role = _verbatim("<|user|>\n", "</s>")
    response: Role = _verbatim("<|assistant|>\n", "</s>")
    system: Role = _verbatim("<|system|>\n", "</s>")


_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class DollyFormat(PromptFormat):
    """databricks/dolly `training/consts.py`; contexts are its `Input:` part."""

    input: Role = _verbatim("### Instruction:\n")
    response: Role = _verbatim("### Response:\n", "\n\n### End")
    contexts: Role = _verbatim("Input:\n")
    nested_contexts: bool = False
    contexts_first: bool = False
    role_separator: str = "\n\n"
    default_system: str = _INSTRUCTION


@dataclass(frozen=True)
class AlpacaFormat(PromptFormat):
    """tatsu-lab/stanford_alpaca `train.py` (PROMPT_DICT); contexts are its input, the answer follows the colon."""

    input: Role = _verbatim("### Instruction:\n")
    response: Role = _verbatim("### Response:")
    contexts: Role = _verbatim("### Input:\n")
    nested_contexts: bool = False
    contexts_first: bool = False
    role_separator: str = "\n\n"
    default_system: str = _INSTRUCTION
    default_system_with_contexts: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
