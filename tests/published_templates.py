"""Chat templates as their repositories publish them (branches for tools left out), and a tokenizer for each."""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm.tokenizer import PromptTokenizer

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A template of the hub and the control tokens that it uses."""

    repo: str
    template: str
    bos: str | None = None
    eos: str
    marks: tuple[str, ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Bytes as tokens, this template, these control tokens."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=self.bos,
            eos_token=self.eos,
            additional_special_tokens=list(self.marks),
            chat_template=self.template,
        )

    def prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self.tokenizer())


CHATML = Published(
    repo="teknium/OpenHermes-2.5-Mistral-7B",
    template=(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    eos="<|im_end|>",
    marks=("<|im_start|>",),
)
SMOLLM2 = Published(
    repo="HuggingFaceTB/SmolLM2-135M-Instruct",
    template=(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    eos="<|im_end|>",
    marks=("<|im_start|>", "<|endoftext|>"),
)
QWEN = Published(
    repo="Qwen/Qwen2.5-7B-Instruct",
    template="""\
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or """
    """(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    eos="<|im_end|>",
    marks=("<|im_start|>", "<|endoftext|>"),
)
LLAMA2 = Published(
    repo="meta-llama/Llama-2-7b-chat-hf",
    template=(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + _ALTERNATE + "{% if "
        "loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    bos="<s>",
    eos="</s>",
)
LLAMA3 = Published(
    repo="meta-llama/Meta-Llama-3-8B-Instruct",
    template=(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
MISTRAL_V1 = Published(
    repo="mistralai/Mistral-7B-Instruct-v0.2",
    template="""\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with one optional system message!') }}
    {%- endif %}
{%- endfor %}
""",
    bos="<s>",
    eos="</s>",
)
MISTRAL_V3 = Published(
    repo="mistralai/Mistral-7B-Instruct-v0.3",
    template="""\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with one optional system message!") }}
    {%- endif %}
{%- endfor %}
""",
    bos="<s>",
    eos="</s>",
    marks=("[INST]", "[/INST]"),
)
GEMMA = Published(
    repo="google/gemma-2-2b-it",
    template=(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}" + _ALTERNATE + "{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    bos="<bos>",
    eos="<eos>",
    marks=("<start_of_turn>", "<end_of_turn>"),
)
PHI3 = Published(
    repo="microsoft/Phi-3-mini-4k-instruct",
    template=(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
        "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    eos="<|endoftext|>",
    marks=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
ZEPHYR = Published(
    repo="HuggingFaceH4/zephyr-7b-beta",
    template=(
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    eos="</s>",
)
PUBLISHED = {
    "ChatMLFormat": CHATML,
    "SmolLM2Format": SMOLLM2,
    "QwenFormat": QWEN,
    "Llama2Format": LLAMA2,
    "Llama3Format": LLAMA3,
    "MistralV1Format": MISTRAL_V1,
    "MistralFormat": MISTRAL_V3,
    "GemmaFormat": GEMMA,
    "PhiFormat": PHI3,
    "ZephyrFormat": ZEPHYR,
}
