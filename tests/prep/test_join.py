"""Where a prompt is cut to be tokenized: at its last control token, near its end or not."""

from hypothesis import given, settings
from hypothesis import strategies as st
from published_templates import Published

from llm.prompt_format import last_control_token
from llm.training.prep.join import last_cut

OVERLAPPING = ("<|im_start|>", "<|im", "|>\n<|im_start|>", "<" * 40 + "end")
TOKENIZER = Published(repo="", template="", bos="<s>", eos="</s>", marks=OVERLAPPING).prompt_tokenizer()


@given(st.lists(st.sampled_from([*OVERLAPPING, "<", "|>", "\n", "d", "x" * 300]), max_size=4).map("".join))
@settings(deadline=None)
def test_prompt_is_cut_where_its_last_control_token_begins(text: str) -> None:
    for num_behind in range(200, 260):  # so that the part that is searched first begins anywhere in a token
        prompt = text + "x" * num_behind
        token = last_control_token(prompt, TOKENIZER.cut_tokens)
        assert last_cut(prompt, TOKENIZER) == (prompt.rfind(token) if token else 0)
