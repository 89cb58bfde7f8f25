"""The exported chat template against the training prompt: formats x prompts x conversations, to the character."""

from collections.abc import Sequence

import pytest
from published_templates import PUBLISHED, Published

from llm.chat_template import ChatTemplateFormat
from llm.errors import DataError
from llm.prompt import DefaultPrompt, FewShotQA, Message, Prompt, StandaloneQuestion, TextSummarization, ZeroShotQA
from llm.prompt_format import PromptFormat, Role
from llm.prompt_registry import PROMPT_FORMATS
from llm.registry import resolve_method
from llm.serving_template import serving_template

ANY = Published(
    repo="",
    template="",
    bos="<s>",
    eos="</s>",
    marks=("<|begin_of_text|>", "<|eot_id|>", "<bos>", "<end_of_turn>", "<|im_end|>", "<|end|>", "### End"),
)
# White space at the ends of the base template, a prefix before the answer, a variable that we use, too, and a setting.
AWKWARD = Published(
    repo="",
    template=(
        " {{ style if style is defined }}{% set ns = namespace(n=0) %}{% set prompt = 'x' %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}\n"
        "[{{ m.role }} {{ ns.n }}]{{ '<think></think> ' if m.role == 'assistant' and not documents else ' ' }}"
        "{{ m.content }}</s>\n{% endfor %}\n{% if add_generation_prompt %}[assistant {{ ns.n + 1 }}]{% endif %}"
    ),
    eos="</s>",
)
CHAT_TEMPLATES = {**PUBLISHED, "awkward": AWKWARD}
CUSTOM = PromptFormat(
    input=Role("<q>", "</q>", strip_text=False),
    response=Role(" ", " "),
    system=Role("<sys>", "</sys>"),
    contexts=Role("<docs>", "</docs>"),
    examples=Role("EXAMPLES\n", "\nNOW\n"),
    nested_contexts=False,
    contexts_first=False,
    turn_separator="\n---\n",
    default_system="Default.",
    default_system_with_contexts="Default, with contexts.",
)
PROMPTS = {
    "plain": Prompt(),
    "system": Prompt(system_message=" Sys {x} \"q\" 'p' \\n é😀 {{ y }} {% if %} {# c #}\n"),
    "default": DefaultPrompt(),
    "zero-shot": ZeroShotQA(),
    "few-shot": FewShotQA(),
    "standalone": StandaloneQuestion(),
    "summary": TextSummarization(),
    "braces": Prompt(
        input_template='{{{text}}} {{% raw %}} {{{{ x }}}} "!"\t',
        context_template="[{index}] {text}\n",
        response_template="A:  {text} .",
    ),
    "context by turns": Prompt(
        examples=[Message("i", "r", ["c"]), Message(" i2 ", " r2 ")], context_template=["1 {text}", "2 {text}"]
    ),
}
CONVERSATIONS = {
    "contexts": [Message(" hi {{x}} {% y %} {# z #}", None, ["c1 ", "c\n2 {text}", "'c3\""])],
    "no contexts": [Message("hi\n")],
    "an empty context": [Message("hi", None, [""])],
    "several turns": [Message("q1", "a1 "), Message("", "a2"), Message("q3 </s> 😀", None, ["d"])],
}


def served(published: Published, template: str, messages: Sequence[Message]) -> str:
    chat = []
    for message in messages:
        chat.append({"role": "user", "content": message.input})
        if message.response is not None:
            chat.append({"role": "assistant", "content": message.response})
    documents = [{"text": text} for text in messages[-1].contexts]
    rendered = published.tokenizer().apply_chat_template(
        chat, chat_template=template, documents=documents or None, add_generation_prompt=True, tokenize=False
    )
    return str(rendered)


def named_formats() -> dict[str, PromptFormat]:
    tokenizer = ANY.prompt_tokenizer()
    kinds = {name: resolve_method(name, PROMPT_FORMATS, key="") for name in PROMPT_FORMATS if "Chat" not in name}
    kinds["ChatMLFormat"] = resolve_method("ChatMLFormat", PROMPT_FORMATS, key="")
    return {name: kind().for_tokenizer(tokenizer) for name, kind in kinds.items()} | {
        "custom": CUSTOM.for_tokenizer(tokenizer)
    }


NAMED = named_formats()


def test_named_formats_here_are_all_of_them() -> None:
    assert len(NAMED) == len(PROMPT_FORMATS) - 1 + 1  # without ChatTemplateFormat, with the custom one


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", NAMED)
def test_serving_template_of_named_format_gives_the_training_prompt(name: str, prompt: str) -> None:
    template = serving_template(PROMPTS[prompt], NAMED[name])
    for title, messages in CONVERSATIONS.items():
        assert served(ANY, template, messages) == PROMPTS[prompt].render(messages, NAMED[name]), title


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_serving_template_of_chat_template_gives_the_training_prompt(name: str, prompt: str) -> None:
    published = CHAT_TEMPLATES[name]
    prompt_format = ChatTemplateFormat().for_tokenizer(published.prompt_tokenizer())
    template = serving_template(PROMPTS[prompt], prompt_format)
    num_compared = 0
    for title, messages in CONVERSATIONS.items():
        try:
            rendered = PROMPTS[prompt].render(messages, prompt_format)
        except DataError:  # Mistral v3 moves the system message as turns are added: it cannot be trained so
            assert (name, title) == ("MistralFormat", "several turns")
            continue
        assert served(published, template, messages) == rendered, title
        num_compared += 1
    assert num_compared >= 3


def test_serving_template_with_template_kwargs_renders_with_them() -> None:
    kwargs = {"style": ' (brief \'n "sweet")', "unset": None}
    prompt_format = ChatTemplateFormat(template_kwargs=kwargs).for_tokenizer(AWKWARD.prompt_tokenizer())
    text = served(AWKWARD, serving_template(Prompt(), prompt_format), [Message("Hi")])
    assert text == Prompt().render([Message("Hi")], prompt_format)
    assert text.startswith(f" {kwargs['style']}[user 1] Hi")


def test_serving_template_system_message_in_the_request_replaces_the_prompts() -> None:
    chat = [{"role": "system", "content": "Theirs."}, {"role": "user", "content": "Hi"}]
    ours = Prompt(system_message="Ours.")
    published = PUBLISHED["ChatMLFormat"]
    formats = [NAMED["ChatMLFormat"], ChatTemplateFormat().for_tokenizer(published.prompt_tokenizer())]
    for prompt_format in formats:
        text = published.tokenizer().apply_chat_template(
            chat, chat_template=serving_template(ours, prompt_format), tokenize=False, add_generation_prompt=True
        )
        bos = "<s>" if prompt_format is formats[0] and NAMED["ChatMLFormat"].BOS else ""
        assert text == (
            f"{bos}<|im_start|>system\nTheirs.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )


def test_serving_template_of_base_with_tools_leaves_them_to_it() -> None:
    base = (
        "{% if tools %}{{ tools | length }} tools. {% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ m.tool_calls | length if m.tool_calls }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    published = Published(repo="", template=base, eos="</s>")
    prompt_format = ChatTemplateFormat().for_tokenizer(published.prompt_tokenizer())
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    text = published.tokenizer().apply_chat_template(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}],
        chat_template=serving_template(Prompt(input_template="Q {text}", response_template="A {text}"), prompt_format),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "1 tools. user: Q q</s>assistant: 1</s>tool: 4</s>assistant: A"
