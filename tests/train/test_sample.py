"""Rows from a model's own answers: forms, labels, what a kill leaves, and a server that fails."""

import doctest
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from bnf_train.data import Options, Prompt, Rules, prompts, read_rows, tokenize, unrendered
from bnf_train.errors import UsageError
from bnf_train.model.generate import generate
from bnf_train.model.load import load_model
from bnf_train.sample import __main__ as command
from bnf_train.sample import labels, local, server
from bnf_train.sample import rows as forms
from bnf_train.sample import run as of_calls
from bnf_train.sample.__main__ import main, parse
from bnf_train.sample.answers import Answers
from bnf_train.sample.labels import rewards
from bnf_train.sample.run import Setting, sample

Write = Callable[..., Path]
CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 2?", "answer": "4", "group": "sums"},
    {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "3 + 3?"}], "answer": "6"},
    {"question": "What is 10 + 10?", "answer": "20"},
    {"prompt": "1?", "completion": "1", "label": True, "answer": "1"},
]
EVEN = "def right(prompt, answer, row):\n    return sum(map(ord, answer)) % 2 == 0\n"
SMALL = ["--max_new_tokens", "8", "--samples", "4", "--batch_size", "8"]


@pytest.fixture
def even(tmp_path: Path) -> str:
    (tmp_path / "even.py").write_text(EVEN)
    return f"{tmp_path / 'even.py'}:right"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def is_even(text: str) -> bool:
    return sum(map(ord, text)) % 2 == 0


@pytest.mark.parametrize("module", [command, forms, local, importlib.import_module("bnf_train.data.prompts")])
def test_doctests(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


# --- a model on this machine -------------------------------------------------------------------------------------------


def test_singles_groups_and_pairs(
    model_folder: Path, write_rows: Write, tmp_path: Path, even: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(ROWS, "prompts.jsonl")
    output = {form: tmp_path / f"{form}.jsonl" for form in ("singles", "groups", "pairs")}
    said = {}
    for form, path in output.items():
        asked = ["--model", str(model_folder), "--prompts", str(source), "--output", str(path), "--form", form, "--check", even]
        assert main([*asked, *SMALL]) == 0
        said[form] = capsys.readouterr().out
        assert not path.with_suffix(".partial.jsonl").exists()
    singles, groups, pairs = (lines(path) for path in output.values())
    assert 12 <= len(singles) <= 16  # 4 prompts, 4 answers; an empty one is left out
    assert {row["label"] for row in singles} == {True, False}
    assert all(row["label"] == is_even(row["completion"]) for row in singles)
    assert singles[0].keys() == {"prompt", "completion", "label", "answer", "group"}
    assert singles[-1].keys() == {"prompt", "completion", "label", "answer"}
    assert [row["prompt"] for row in groups] == [ROWS[0]["prompt"], ROWS[1]["prompt"], ROWS[2]["question"], ROWS[3]["prompt"]]
    assert [text for row in groups for text in row["completions"]] == [row["completion"] for row in singles]
    assert [label for row in groups for label in row["labels"]] == [row["label"] for row in singles]
    mixed = [row for row in groups if len(set(row["labels"])) == 2]
    assert [row["prompt"] for row in pairs] == [row["prompt"] for row in mixed]
    assert all(is_even(row["chosen"]) and not is_even(row["rejected"]) for row in pairs)
    right = sum(row["label"] for row in singles)
    assert "4 prompts, 16 answers" in said["singles"]
    assert f"{right:,} right" in said["singles"] or len(singles) < 16
    assert f"{output['pairs']}: {len(pairs)} rows (pairs)." in said["pairs"]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for form, path in output.items():
        trained, counts = tokenize(read_rows(str(path)), tokenizer, 256, form)
        assert len(trained) == len(lines(path))
        assert not counts.left_out


# whole lines, the first of which says what was asked, and characters of the next one
@pytest.mark.parametrize(("whole_lines", "more"), [(0, 20), (1, 0), (2, 20), (4, 1), (5, 0)])
def test_what_was_stopped_goes_on_as_if_it_had_not_been(
    model_folder: Path, write_rows: Write, tmp_path: Path, even: str, whole_lines: int, more: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = write_rows(ROWS, "prompts.jsonl")
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    def asked(path: Path) -> list[str]:
        return ["--model", str(model_folder), "--prompts", str(source), "--output", str(path), "--check", even, *SMALL]

    kept = {}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: kept.update({path.name: path.read_bytes()}))
        assert main(asked(whole)) == 0
    written = kept["whole.partial.jsonl"].splitlines(keepends=True)
    assert len(written) == 1 + len(ROWS)
    left = b"".join(written[:whole_lines]) + b"".join(written[whole_lines:])[:more]
    cut.with_suffix(".partial.jsonl").write_bytes(left)
    there = max(whole_lines - 1, 0)
    capsys.readouterr()
    assert main(asked(cut)) == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert (f"answers to {there} prompts are there" in capsys.readouterr().out) == (there > 0)


def test_rules_template_device_and_precision_may_be_given_from_python(
    model_folder: Path, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    dated = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    template.write_text(dated + (model_folder / "chat_template.jinja").read_text())
    source, seen = write_rows([{"prompt": 5}, ROWS[0]], "prompts.jsonl"), list[Any]()

    def spied(model: Any, tokenizer: Any, asked: Any, there: Any, device: Any, autocast: Any, **how: Any) -> Any:
        seen.append((tokenizer.decode(asked[0].ids), len(asked), model.device, model.dtype, device, autocast))
        return local.from_model(model, tokenizer, asked, there, device, autocast, **how)

    monkeypatch.setattr(of_calls, "from_model", spied)
    flags = parse(["--model", str(model_folder), "--prompts", str(source), "--output", str(tmp_path / "rows.jsonl"), *SMALL])
    options = Options(str(template), date="2020-02-03")
    setting = Setting(Rules(malformed="drop"), options, CPU, torch.bfloat16, torch.float16, keep_answers=True)
    sample(flags, Console(quiet=True), setting)
    ((text, *other),) = seen
    assert "03 Feb 2020" in text
    assert other == [1, CPU, torch.bfloat16, CPU, torch.float16]
    assert (tmp_path / "rows.partial.jsonl").exists()


def test_another_form_of_the_answers_that_are_there(
    completions: tuple[str, type["Completions"]], write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows(ROWS, "prompts.jsonl"), tmp_path / "rows.jsonl"
    asked = ["--server", completions[0], "--server_model", "tiny", "--prompts", str(source), "--output", str(output)]
    assert main([*asked, "--check", "regex=.", "--form", "pairs"]) == 2
    assert "alike for every prompt" in capsys.readouterr().err
    before = len(completions[1].seen)
    assert main([*asked, "--check", "regex=.", "--form", "groups"]) == 0
    assert len(completions[1].seen) == before
    assert [row["labels"] for row in lines(output)] == [[True] * 5] * 4


def test_prompts_are_those_of_the_training_split(
    completions: tuple[str, type["Completions"]], write_rows: Write, tmp_path: Path
) -> None:
    """Rows that are trained on may not come of what is tested on."""
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        write_rows([{"prompt": f"{name}?", "answer": 1}], f"data/{name}.jsonl")
    for more, prompt in (("", "train?"), ("=test", "test?")):
        output = tmp_path / f"{prompt[:-1]}.jsonl"
        asked = ["--server", completions[0], "--server_model", "tiny", "--prompts", f"{tmp_path / 'data'}{more}"]
        assert main([*asked, "--output", str(output)]) == 0
        assert [row["prompt"] for row in lines(output)] == [prompt] * 5


def test_a_file_of_other_arguments_is_refused(
    model_folder: Path, write_rows: Write, tmp_path: Path, even: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(ROWS, "prompts.jsonl")
    output = tmp_path / "rows.jsonl"
    asked = ["--model", str(model_folder), "--prompts", str(source), "--output", str(output), *SMALL]
    (tmp_path / "bad.py").write_text("def right(prompt, answer, row):\n    return 2 if answer else 0\n")
    assert main([*asked, "--check", f"{tmp_path / 'bad.py'}:right"]) == 2  # stops behind the first answers
    capsys.readouterr()
    for more, sentence in (
        (["--check", even], "--check"),
        (["--check", f"{tmp_path / 'bad.py'}:right", "--temperature", "0.5"], "--temperature 0.5"),
    ):
        assert main([*asked, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {sentence}")
        assert "remove the file to begin anew" in error
    write_rows(ROWS[:2], "prompts.jsonl")
    assert main([*asked, "--check", f"{tmp_path / 'bad.py'}:right"]) == 2
    assert "--prompts: has other rows" in capsys.readouterr().err
    output.with_suffix(".partial.jsonl").write_text("nonsense\n")
    assert main(asked) == 2
    assert "is damaged" in capsys.readouterr().err
    output.write_text("")
    assert main(asked) == 2
    assert "expected a new file" in capsys.readouterr().err


def test_answers_depend_on_the_seed_alone(model_folder: Path) -> None:
    model, tokenizer = load_model(str(model_folder)), AutoTokenizer.from_pretrained(model_folder)
    asked, _ = prompts(ROWS, tokenizer, "rows")
    how = {"samples": 4, "batch_size": 8, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 8}

    def drawn(there: set[int], seed: int = 0) -> dict[int, Answers]:
        return dict(local.from_model(model, tokenizer, asked, there, CPU, seed=seed, **how))

    whole = drawn(set())
    assert sorted(whole) == [0, 1, 2, 3]
    for there in ({0}, {1, 3}, {0, 1, 2, 3}):
        torch.rand(1)  # other random numbers of the process change nothing
        assert drawn(there) == {place: answers for place, answers in whole.items() if place not in there}
    assert drawn(set(), seed=1) != whole
    assert all(len(set(answers.texts)) > 1 for answers in whole.values())
    greedy = dict(local.from_model(model, tokenizer, asked, set(), CPU, seed=0, **how | {"samples": 1, "temperature": 0.0}))
    expected = generate(model, tokenizer, [prompt.ids for prompt in asked], CPU, max_new_tokens=8)
    assert [greedy[i].tokens for i in range(4)] == [len(answer.tokens) for answer in expected]


# --- forms and counts --------------------------------------------------------------------------------------------------


def test_empty_answers_and_those_alike() -> None:
    prompt = unrendered([{"prompt": "p", "system": "Be short.", "answer": 1, "label": True}], "rows")[0]
    some = Answers(["", "a", "b"], [False, True, False], 6, [1.0, 0.5, 0.4])
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "p"}]
    assert [(m["role"], m["content"]) for m in prompt.conversation[0]] == [(m["role"], m["content"]) for m in messages]
    assert forms.rows(prompt, some, "singles", False) == [
        {"prompt": messages, "completion": "a", "label": True, "answer": 1},
        {"prompt": messages, "completion": "b", "label": False, "answer": 1},
    ]
    assert forms.rows(prompt, some, "groups", True) == [
        {"prompt": messages, "completions": ["a", "b"], "scores": [0.5, 0.4], "answer": 1}
    ]
    alike = Answers(["a", "b"], [False, False], 4, [1.0, 1.0])
    assert forms.rows(prompt, alike, "pairs", False) == []
    assert forms.rows(prompt, Answers(["a"], [False], 1), "singles", False) == [
        {"prompt": messages, "completion": "a", "answer": 1}
    ]
    said = forms.sentences([some, alike], 1, "pairs", False, 8)
    assert said[0] == "2 prompts, 5 answers, 2.0 tokens on average; 1 cut at --max_new_tokens 8."
    assert "1 empty answers left out." in said
    assert "4 right (80.0%); of 1 prompts all answers are right, of 0 none." in said
    assert "1 prompts whose answers are all alike left out." in said
    assert "cannot be trained on" in forms.sentences([Answers(["a"], [False], 1)], 1, "singles", False, 8)[-1]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "--model, --server: expected one of them, got neither"),
        (["--model", "m", "--server", "http://x"], "got both"),
        (["--server", "http://x"], "--server_model"),
        (["--server", "x", "--server_model", "m"], "--server x: expected an address"),
        (["--model", "m", "--form", "pairs"], "--form pairs: needs labels"),
        (["--model", "m", "--check", "exact", "--form", "pairs", "--samples", "1"], "at least 2 answers"),
        (["--model", "m", "--check", "exact", "--reward_model", "r"], "--check, --reward_model"),
        (["--model", "m", "--temperature", "0"], "--temperature 0"),
        (["--model", "m", "--temperature", "nan"], "--temperature"),
        (["--model", "m", "--top_p", "0"], "--top_p"),
        (["--model", "m", "--samples", "0"], "--samples: expected at least 1"),
        (["--model", "m", "--output", "rows.csv"], "ends in .jsonl"),
    ],
)
def test_flags_that_cannot_be(more: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(["--prompts", "p.jsonl", "--output", "rows.jsonl", *more])
    assert sentence in str(error.value)


# --- a server ----------------------------------------------------------------------------------------------------------


class Completions(BaseHTTPRequestHandler):
    """Chat completions: the first answers are failures, then the seed and the prompt are said."""

    failures: list[tuple[int, str]]
    seen: list[tuple[str | None, dict[str, Any]]]
    most = 100  # choices in one answer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        code, text = self.failures.pop(0) if self.failures else (200, "")
        if self.path != "/v1/chat/completions":
            code, text = 404, "no such path"
        count = min(body["n"], self.most)
        words = [f"{body['messages'][-1]['content']} {body['seed']} {i}" for i in range(count)]
        choices = [{"message": {"role": "assistant", "content": word}, "finish_reason": "length"} for word in words]
        content = text or json.dumps({"choices": choices, "usage": {"completion_tokens": 3 * count}})
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Completions]]]:
    handler = type("Handler", (Completions,), {"failures": [], "seen": []})
    monkeypatch.setattr(server, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1", handler
        listening.shutdown()


def test_a_server_that_fails_twice(
    completions: tuple[str, type[Completions]], write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url, handler = completions
    handler.failures += [(503, "warming up"), (503, "warming up")]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    output, source = tmp_path / "rows.jsonl", write_rows(ROWS, "prompts.jsonl")
    asked = ["--server", url, "--server_model", "tiny", "--prompts", str(source), "--concurrency", "2", "--samples", "3"]
    assert main([*asked, "--output", str(output), "--form", "groups", "--check", "regex=[02468] 0$"]) == 0
    assert "4 prompts, 12 answers, 3.0 tokens on average; 12 cut" in capsys.readouterr().out
    assert len(handler.seen) == 6
    assert {key for key, _ in handler.seen} == {"Bearer secret"}
    told = {name: handler.seen[0][1][name] for name in ("model", "n", "temperature", "top_p", "max_tokens")}
    assert told == {"model": "tiny", "n": 3, "temperature": 0.8, "top_p": 1.0, "max_tokens": 512}
    rows = lines(output)
    assert [row["prompt"] for row in rows] == [ROWS[0]["prompt"], ROWS[1]["prompt"], ROWS[2]["question"], ROWS[3]["prompt"]]
    for place, row in enumerate(rows):
        last = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        seed = local.numbered_seed(0, place)
        assert row["completions"] == [f"{last} {seed} {i}" for i in range(3)]
        assert row["labels"] == [seed % 2 == 0, False, False]


def test_a_server_that_gives_one_choice_is_asked_again(completions: tuple[str, type[Completions]]) -> None:
    url, handler = completions
    handler.most = 1
    found = dict(server.Server(url, "tiny", 3, 0, {})(unrendered(ROWS[:1], "rows"), ()))
    assert [body["n"] for _, body in handler.seen] == [3, 2, 1]
    assert len(set(found[0].texts)) == 3
    assert found[0].tokens == 9


def test_what_a_server_gave_before_it_failed_is_kept(
    completions: tuple[str, type[Completions]], write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler = completions
    handler.failures += [(200, ""), *[(503, "out of order")] * 4]
    output, source = tmp_path / "rows.jsonl", write_rows(ROWS, "prompts.jsonl")
    asked = ["--server", url, "--server_model", "tiny", "--prompts", str(source), "--concurrency", "1", "--output", str(output)]
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert f"--server {url}: no answer after 4 tries (503 Service Unavailable: out of order)" in error
    assert len(error.splitlines()) == 1
    assert len(lines(output.with_suffix(".partial.jsonl"))) == 2  # what was asked, and one prompt
    asked_before = len(handler.seen)
    assert main(asked) == 0
    assert len(handler.seen) - asked_before == 3
    assert len(lines(output)) == 20


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        ((400, "no such model"), "refuses the request (400 Bad Request: no such model)"),
        ((200, "<html>"), "expected chat completions with choices, got '<html>'"),
        ((200, '{"choices": []}'), "expected chat completions with choices"),
        ((200, '{"error": "x"}'), "expected chat completions with choices"),
    ],
)
def test_what_is_no_answer_is_not_asked_for_again(
    completions: tuple[str, type[Completions]], failure: tuple[int, str], sentence: str
) -> None:
    url, handler = completions
    handler.failures.append(failure)
    with pytest.raises(UsageError) as error:
        list(server.Server(url, "tiny", 2, 0, {})(unrendered(ROWS[:1], "rows"), ()))
    assert sentence in str(error.value)
    assert len(handler.seen) == 1


def test_a_pause_is_as_long_as_the_server_asks_for() -> None:
    def asked_for(after: str, pause: float | None) -> float | None:
        headers = Message()
        headers["Retry-After"] = after
        return server._asked_for(HTTPError("", 429, "", headers, None), pause)

    assert asked_for("3", 1.0) == 3.0
    assert asked_for("3", 8.0) == 8.0
    assert asked_for("3600", 1.0) == server.LONGEST_PAUSE
    assert asked_for("Wed, 21 Oct 2015 07:28:00 GMT", 1.0) == 1.0
    assert asked_for("3", None) is None


def test_a_server_that_is_not_there(completions: tuple[str, type[Completions]]) -> None:
    with pytest.raises(UsageError, match=r"no answer after 4 tries \(\[Errno 111\] Connection refused\)"):
        list(server.Server("http://127.0.0.1:9/v1", "tiny", 2, 0, {})(unrendered(ROWS, "rows"), ()))


# --- a reward model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores(
    reward_folder: Path, model_folder: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(ROWS, "prompts.jsonl")
    output = {form: tmp_path / f"{form}.jsonl" for form in ("singles", "groups", "pairs")}
    for form, path in output.items():
        asked = ["--model", str(model_folder), "--prompts", str(source), "--output", str(path), "--form", form]
        assert main([*asked, "--reward_model", str(reward_folder), *SMALL]) == 0
        assert "Scores from" in capsys.readouterr().out
    singles, groups, pairs = (lines(path) for path in output.values())
    assert [score for row in groups for score in row["scores"]] == [row["score"] for row in singles]
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    for row in singles:  # each alone, from text
        messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": row["completion"]}], tokenize=False)
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits
        assert row["score"] == pytest.approx(alone.item(), abs=1e-5)
    assert len(pairs) == 4
    for row, group in zip(pairs, groups, strict=True):
        by_score = dict(zip(group["scores"], group["completions"], strict=True))
        assert (row["chosen"], row["rejected"]) == (by_score[max(by_score)], by_score[min(by_score)])
    trained, _ = tokenize(read_rows(str(output["groups"])), tokenizer, 256, "groups")
    assert [response.score for row in trained for response in row.responses] == [row["score"] for row in singles]


def test_a_reward_model_without_padding_reads_answers_one_by_one(reward_folder: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    prompt: Prompt = unrendered(ROWS[:1], "rows")[0]
    padded = rewards(model, tokenizer, prompt, ["a", "longer than that"], CPU)
    model.config.pad_token_id = None
    assert rewards(model, tokenizer, prompt, ["a", "longer than that"], CPU) == pytest.approx(padded, abs=1e-5)
    model.score.weight.data[:] = torch.nan
    with pytest.raises(UsageError, match="expected finite rewards, got nan"):
        rewards(model, tokenizer, prompt, ["a"], CPU)


def test_what_is_no_reward_model(model_folder: Path, reward_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--reward_model .*lack score.weight"):
        labels.by_reward(str(model_folder), CPU)
    config = json.loads((reward_folder / "config.json").read_text())
    model = LlamaForSequenceClassification(LlamaConfig(**config | {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}))
    model.save_pretrained(reward_folder)
    with pytest.raises(UsageError, match="expected a model of one label, the reward, got 2"):
        labels.by_reward(str(reward_folder), CPU)
