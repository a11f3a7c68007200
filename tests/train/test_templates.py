"""Chat templates that do what those of public models do: each is written here, and named after its behaviour."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from bnf_train.data import Counts, Options, Rules, tokenize
from bnf_train.errors import UsageError

MARKS = ["<|im_start|>", "<|turn|>", "<|stop|>", "<|part|>", "<|channel|>"]
FOR = "{% for m in messages %}"
ROLES = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = FOR + "{{ " + ROLES + " }}{% endfor %}" + ASKS


def turn(role: str, text: str | None) -> dict[str, Any]:
    return {"role": role, "content": text}


USER, SYSTEM, HI = turn("user", "Name a colour."), turn("system", "Be brief."), turn("assistant", "Hello!")
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}


class Case(NamedTuple):
    """A template, a prompt and a response, and what is trained on."""

    template: str
    prompt: Any
    response: Any
    expected: tuple[str, str]
    added: str = ""
    rewritten: bool = False
    columns: dict[str, Any] = {}  # noqa: RUF012
    kwargs: dict[str, Any] = {}  # noqa: RUF012


THINKS_IF_ASKED = (
    FOR + "{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% else %}{{ " + ROLES + " }}{% endif %}{% endfor %}" + ASKS
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)  # fmt: skip
THINKS_ALWAYS = (  # the prompt opens the block, which the template closes in every response
    FOR + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% if '</think>' in m['content'] %}"
    "{{ '<think>\n' + m['content'].split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' }}"
    "{{ m['content'].split('</think>')[-1].strip() }}{% else %}{{ '<think>\n\n</think>\n\n' + m['content'] }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
    + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
FORGETS_THOUGHTS = (  # the prompt opens the block, and earlier answers stand without it
    FOR + "{% if m['role'] == 'user' %}{{ '<|turn|>' + m['content'] }}{% else %}"
    "{{ '<|part|>' + m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|part|><think>\n' }}{% endif %}"
)
SYSTEM_IN_LAST_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if m['role'] == 'user' %}{{ '<|turn|>' }}"
    "{{ system + '\n\n' if system is defined and loop.last }}{{ m['content'] + '<|stop|>' }}{% else %}"
    "{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
TWO_ENDS = (
    FOR
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|stop|>\n' }}{% endfor %}"
    + ("{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}")
)
RESPONSE_MARKS = (
    FOR
    + "{{ '<|turn|>' + m['role'] + '<|part|>' + m['content'] + '<|part|><|stop|>' }}{% endfor %}"
    + ("{% if add_generation_prompt %}{{ '<|turn|>assistant<|part|>' }}{% endif %}")
)
CHANNELS = (
    FOR
    + "{{ '<|turn|>' + m['role'] }}{{ '<|channel|>final' if m['role'] == 'assistant' }}"
    + (
        "{{ '<|part|>' + m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' and loop.last else '<|stop|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant' }}{% endif %}"
    )
)
PROMPT_ENDS_IN_A_SPACE = (
    FOR + "{{ 'Q: ' + m['content'] + ' A: ' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
)
PARTS_ONLY = (
    FOR
    + "{{ '<|turn|>' }}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    + ("{{ '<|stop|>' }}{% endfor %}")
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    + FOR + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{{ 'CALL ' + (m.tool_calls | tojson) if m.tool_calls }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)  # fmt: skip
DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
HEAD, TAIL = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"

CASES = {
    "as chatml": Case(CHATML, [USER], "Blue.", (HEAD, "Blue." + TAIL)),
    "a space before the response": Case(
        SYSTEM_IN_LAST_USER, [USER], "Blue.", ("<|turn|>Name a colour.<|stop|>", " Blue." + TAIL)
    ),
    "the system message in the last user's": Case(
        SYSTEM_IN_LAST_USER, [SYSTEM, USER], "Blue.", ("<|turn|>Be brief.\n\nName a colour.<|stop|>", " Blue." + TAIL)
    ),
    "an empty block added": Case(
        THINKS_IF_ASKED, [USER], "Blue.", (HEAD, "<think>\n\n</think>\n\nBlue." + TAIL), "<think>\n\n</think>"
    ),
    "an empty block in the prompt": Case(
        THINKS_IF_ASKED, [USER], "Blue.", (HEAD + "<think>\n\n</think>\n\n", "Blue." + TAIL), kwargs={"enable_thinking": False}
    ),
    "a block that the prompt opens": Case(
        THINKS_ALWAYS, [USER], "Blue.", (HEAD + "<think>\n", "\n</think>\n\nBlue." + TAIL), "</think>"
    ),
    "a response that goes on in the opened block": Case(
        THINKS_ALWAYS, [USER], "<think>\nSky.\n</think>\n\nBlue.", (HEAD + "<think>\n", "Sky.\n</think>\n\nBlue." + TAIL)
    ),
    "thoughts that the template forgets": Case(
        FORGETS_THOUGHTS,
        [USER],
        "<think>\nSky.</think>Blue.",
        ("<|turn|>Name a colour.<|part|><think>\n", "Sky.</think>Blue." + TAIL),
    ),
    "an opened block that no response writes": Case(
        FORGETS_THOUGHTS, [USER], "Blue.", ("<|turn|>Name a colour.<|part|><think>\n", "Blue." + TAIL)
    ),
    "two ends": Case(TWO_ENDS, [USER], "Blue.", ("<|user|>\nName a colour.<|stop|>\n<|assistant|>\n", "Blue.<|stop|>")),
    "an end of two tokens": Case(
        RESPONSE_MARKS,
        [USER],
        "Blue.",
        ("<|turn|>user<|part|>Name a colour.<|part|><|stop|><|turn|>assistant<|part|>", "Blue.<|part|><|stop|>"),
    ),
    "a channel before the response": Case(
        CHANNELS,
        [USER],
        "Blue.",
        ("<|turn|>user<|part|>Name a colour.<|stop|><|turn|>assistant", "<|channel|>final<|part|>Blue." + TAIL),
        "<|channel|>final<|part|>",
    ),
    "a prompt that ends in a space": Case(PROMPT_ENDS_IN_A_SPACE, [USER], "Blue.", ("Q: Name a colour. A: ", "Blue." + TAIL)),
    "a response that begins with a newline": Case(CHATML, [USER], "\nBlue.", (HEAD, "\nBlue." + TAIL)),
    "a template that trims": Case(TRIMS, [USER], " Blue. \n", (HEAD, "Blue." + TAIL)),
    "content in parts": Case(
        PARTS_ONLY, [USER], "Blue.", ("<|turn|>Name a colour.<|stop|>", "<|turn|>Blue.<|stop|>"), "<|turn|>"
    ),
    "a prefilled answer": Case(CHATML, [USER, turn("assistant", "Bl")], "ue.", (HEAD + "Bl", "ue." + TAIL)),
    "tools": Case(
        TOOLS,
        [USER],
        "Blue.",
        ('<|im_start|>system\n[{"name": "f"}]<|im_end|>\n' + HEAD, "Blue." + TAIL),
        columns={"tools": [{"name": "f"}]},
    ),
    "a call": Case(
        TOOLS,
        [USER],
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        (HEAD, 'CALL [{"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}]' + TAIL),
    ),
    "an end in the data": Case(
        TWO_ENDS, [USER], "Blue.<|stop|>\n", ("<|user|>\nName a colour.<|stop|>\n<|assistant|>\n", "Blue.<|stop|>")
    ),
}


@pytest.fixture
def marked(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


def trained_on(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], rules: Rules | None = None, options: Options | None = None
) -> tuple[list[tuple[str, str]], Counts]:
    rows, counts = tokenize([row], tokenizer, 1000, "x.jsonl", rules, options)
    texts = [
        (tokenizer.decode(r.input_ids[: r.prompt_length]), tokenizer.decode(r.input_ids[r.prompt_length :]))
        for r in rows[0].responses
    ]
    return texts, counts


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_prompt_as_at_inference_then_the_response(marked: PreTrainedTokenizerFast, case: Case) -> None:
    marked.chat_template = case.template
    row = {"prompt": case.prompt, "completion": case.response, "label": True, **case.columns}
    texts, counts = trained_on(marked, row, options=Options(chat_template_kwargs=case.kwargs))
    assert texts == [case.expected]
    block = "<think>" if case.template == FORGETS_THOUGHTS and "</think>" not in case.response else ""
    assert counts == Counts(
        rows=1, added=[1] if case.added else [], added_text=case.added, blocks=[1] * bool(block), block=block
    )


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (
            CHATML.replace("{{ " + ROLES, "{{ '' if m['role'] not in ('user', 'assistant') else " + ROLES),
            [turn("developer", "Be brief."), USER],
            r"writes nothing of it \(developer: 'Be brief\.'\); fix it, or pass --not_rendered drop",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML,
            [SYSTEM, USER],
            r"refuses this conversation \(no system messages\); fix it, or pass --template_refuses drop",
        ),
        (
            CHATML,
            [USER, turn("assistant", None) | {"tool_calls": [CALL]}, turn("tool", "yes")],
            r"writes nothing of it \(assistant: a tool call, which may be written as text instead\)",
        ),
        (CHATML, HEAD, r"expected plain text, got the chat template's own <\|im_start\|> in it"),
    ],
    ids=["a message left out", "refused", "a call left out", "already rendered"],
)
def test_every_refusal_has_its_rule(marked: PreTrainedTokenizerFast, template: str, prompt: Any, message: str) -> None:
    marked.chat_template = template
    rule = {"writes": "not_rendered", "refuses": "template_refuses", "expected": "already_rendered"}[message.split()[0]]
    raw = [{"prompt": p, "chosen": "Blue.", "rejected": "No."} for p in ([USER], prompt)]
    with pytest.raises(UsageError, match=r"x.jsonl, row 2: .*" + message):
        tokenize(raw, marked, 1000, "x.jsonl")
    rows, counts = tokenize(raw, marked, 1000, "x.jsonl", Rules(**{rule: "drop"}))
    assert [row.number for row in rows] == [1]
    assert counts == Counts(rows=2, left_out={rule: [2]}, unused=counts.unused)
    assert counts.sentences(Rules(**{rule: "drop"}))[0].endswith(f"(--{rule} drop): row 2")


def test_text_that_has_been_through_the_template(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    row = {"prompt": HEAD, "completion": "Blue.<|im_end|>\n", "label": True}
    assert trained_on(marked, row, Rules(already_rendered="as_is"))[0] == [(HEAD, "Blue." + TAIL)]
    (prompt, _), *_ = trained_on(marked, row, Rules(already_rendered="text"))[0]
    assert prompt == "<|im_start|>user\n" + HEAD + "<|im_end|>\n<|im_start|>assistant\n"


def test_a_date_is_that_of_the_run(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = DATED
    row = {"prompt": [USER], "completion": "Blue.", "label": True}
    texts, _ = trained_on(marked, row, options=Options(date="2024-02-29"))
    assert texts == [("<|im_start|>system\n29 Feb 2024<|im_end|>\n" + HEAD, "Blue." + TAIL)]


def test_one_of_several_templates(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = {"default": CHATML, "tool_use": TOOLS}
    row = {"prompt": [USER], "completion": "Blue.", "label": True}
    assert trained_on(marked, row)[0] == [(HEAD, "Blue." + TAIL)]
    (prompt, _), *_ = trained_on(marked, row | {"tools": [{"name": "f"}]})[0]
    assert prompt == '<|im_start|>system\n[{"name": "f"}]<|im_end|>\n' + HEAD


def test_a_template_of_ones_own(marked: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (own := tmp_path / "own.jinja").write_text(
        "{{ 'Q: ' + messages[0]['content'] + '\nA:' }}{{ ' ' + messages[1]['content'] if messages[1:] }}"
    )
    texts, _ = trained_on(marked, {"prompt": "a", "completion": "b", "label": True}, options=Options(chat_template=str(own)))
    assert texts == [("Q: a\nA:", " b" + TAIL)]
    (bad := tmp_path / "bad.jinja").write_text("{% for")
    for path, message in ((tmp_path / "none.jinja", "No such file"), (bad, "expected a Jinja template")):
        with pytest.raises(UsageError, match=rf"--chat_template .*{path.name}: .*{message}"):
            trained_on(marked, {"prompt": "a", "completion": "b", "label": True}, options=Options(chat_template=str(path)))


def test_what_a_row_carries_and_nobody_reads_is_named(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    message = {**USER, "name": "Ann", "id": 3}
    row = {
        "prompt": [message],
        "completion": "Blue.",
        "label": True,
        "source": "web",
        "score_model": None,
        "tools": [{"name": "f"}],
    }
    _, counts = trained_on(marked, row)
    assert counts.unused == [
        "x.jsonl: columns that are not used: source.",
        "x.jsonl: column tools: not used, because the chat template does not read it.",
        "x.jsonl: keys of messages that are not used, because the chat template does not read them: id, name.",
    ]
    marked.chat_template = CHATML.replace("m['role'] +", "m['role'] + (m.name if m.name else '') +")
    assert trained_on(marked, row)[1].unused[-1].endswith("does not read them: id.")


def test_sides_that_became_one_by_cutting(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    row = {"prompt": "a", "chosen": "b" * 50 + "c", "rejected": "b" * 50 + "d"}
    length = len(tokenize([row], marked, 1000, "x.jsonl")[0][0].responses[0].input_ids)
    _, counts = tokenize([row], marked, length - 10, "x.jsonl")
    assert counts == Counts(rows=1, cut=[1, 1], same_sides=[1])


def test_a_call_that_the_template_does_not_write_is_no_response(marked: PreTrainedTokenizerFast) -> None:
    """Though its function is declared in the prompt, and though there is text beside it."""
    marked.chat_template = TOOLS.replace("{{ 'CALL ' + (m.tool_calls | tojson) if m.tool_calls }}", "")
    for content in (None, "Let me look."):
        call = [{"role": "assistant", "content": content, "tool_calls": [CALL]}]
        row = {"prompt": "Call rain.", "completion": call, "label": True, "tools": [{"name": "rain"}]}
        with pytest.raises(UsageError, match=r"response: .* writes nothing of it \(assistant: a tool call"):
            tokenize([row], marked, 1000, "x.jsonl")


def test_a_begun_answer_is_not_repeated_and_keeps_its_tags(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    prompt = [USER, turn("assistant", "<ul><li>")]
    texts, _ = trained_on(marked, {"prompt": prompt, "completion": "<li>x", "label": True})
    assert texts == [(HEAD + "<ul><li>", "<li>x" + TAIL)]
    with pytest.raises(UsageError, match=r"the response repeats the beginning that the prompt has of it \('<ul><li>'\)"):
        tokenize([{"prompt": prompt, "completion": "<ul><li>x", "label": True}], marked, 100, "x.jsonl")


def test_a_block_that_a_response_opens_again_is_counted(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = THINKS_IF_ASKED
    row = {"prompt": [USER], "completion": "<think>\nSky.\n</think>\n\nBlue.", "label": True}
    _, counts = trained_on(marked, row, options=Options(chat_template_kwargs={"enable_thinking": False}))
    assert (counts.blocks, counts.block) == ([1], "<think>")
    assert "open it again" in counts.sentences(Rules())[0]


@pytest.mark.parametrize(("template", "response"), [(FORGETS_THOUGHTS, "<think>\n"), (CHATML, "<|im_end|>\n")])
def test_a_response_that_is_nothing_but_marks_is_empty(marked: PreTrainedTokenizerFast, template: str, response: str) -> None:
    marked.chat_template = template
    rows = [{"prompt": [USER], "completion": text, "label": True} for text in ("Blue.", response)]
    with pytest.raises(UsageError, match=r"row 2: nothing is left of a response .*; fix it, or pass --empty drop"):
        tokenize(rows, marked, 1000, "x.jsonl")
    kept, counts = tokenize(rows, marked, 1000, "x.jsonl", Rules(empty="drop"))
    assert ([row.number for row in kept], counts.left_out) == ([1], {"empty": [2]})
