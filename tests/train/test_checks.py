"""Right answers: the checks, the estimators, the prompts that are asked, and what a run says of it before and after."""

import doctest
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from launched import Launcher
from same_run import assert_same_run, logged
from transformers import PreTrainedTokenizerFast

from bnf_train import checks, functions, run
from bnf_train.__main__ import main
from bnf_train.analyze.__main__ import main as analyze
from bnf_train.checks import Asked, bootstrap, builtin, estimate, find, last_number, pass_at_k, resolve, student, summary
from bnf_train.compare.report import START, markdown, summaries
from bnf_train.data import prompts, tokenize
from bnf_train.errors import UsageError
from bnf_train.model.generate import _Batches, generate, greedy_and_sampled
from bnf_train.model.load import load_model
from bnf_train.training import checking

CPU = torch.device("cpu")
Write = Callable[..., Path]


# --- the checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [functions, builtin, find, estimate])
def test_doctests(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips.\n#### 72", 72),
        ("#### 1,234", 1234),
        ("#### 18 (in 3 steps)", 18),
        ("A: 18", 18),
        ("The answer is 18.", 18),
        ("**18**", 18),
        (r"so $\boxed{18}$.", 18),
        ("She pays $1,234.50.", Fraction("1234.5")),
        (r"She pays \$12.", 12),
        ("It costs 5€", 5),
        ("x = -3", -3),
        ("x=-3.5", Fraction("-3.5")),
        ("It fell to \u22123 degrees", -3),  # a minus sign
        ("he owes -$5", -5),
        ("he owes $-5", -5),
        ("pages 3-5", 5),
        ("7 - 5", 5),
        ("3/4 of them", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"$-\dfrac{3}{4}$", Fraction(-3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("half, .5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("5/0", 0),
        ("due 1/2/2020", 2020),
        ("a list 1,2,3", 3),
        ("10,000,000 people", 10_000_000),
        ("1{,}000", 1000),
        ("2.5e3", 2500),
        ("50%", 50),
        ("18 tons of CO2", 18),
        ("the 18th", 18),
        ("5kg", 5),
        ("2.", 2),
        ("3 apples. 4. pears", 4),
        ("no number", None),
        ("", None),
        ("#### none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: Any) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("name", "answer", "expected", "right"),
    [
        ("number", "So 18.\nA: 18", "9 + 9 = 18\n#### 18", True),
        ("number", "18 dollars, of 20", "#### 18", False),
        ("number", "It is 1234.5", "$1,234.50", True),
        ("number", "a half: 0.5", "1/2", True),
        ("number", "18", 18, True),
        ("number", "18", 18.0, True),
        ("number", "eighteen", "18", False),
        ("exact", "olleh\n", "olleh", True),
        ("exact", "Olleh", "olleh", False),
        ("exact", "olleh!", "olleh", False),
        ("exact", "", "olleh", False),
        ("contains", "The capital is Paris.", "Paris", True),
        ("contains", "The capital is Rome.", "Paris", False),
        (r"regex=^\d+$", "18", None, True),
        (r"regex=^\d+$", "18.", None, False),
        ("regex=a:b", "a:b", None, True),
    ],
)
def test_a_built_in_check_says_what_is_right(name: str, answer: str, expected: Any, right: bool) -> None:
    row = {} if expected is None else {"answer": expected}
    assert resolve(name)("?", answer, row, "x, row 1") == right


def test_math_verify_is_one_sentence_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UsageError, match=r"--check math_verify: needs the package math-verify, .*pip install"):
        builtin.math_verify("--check math_verify")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("A: 18", "#### 18", True),
        ("17", "18", False),
    ],
)
def test_math_verify_compares_as_mathematics(answer: str, expected: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert resolve("math_verify")("", answer, {"answer": expected}, "x, row 1") == right


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nubmer", r"--check nubmer: expected exact, contains, number, regex=PATTERN, math_verify, .*the nearest is number\."),
        ("regex=", r"--check regex=: expected"),
        ("regex=(", r"--check regex=\(: expected a regular expression behind regex=, got one with an error"),
        ("no_such_module_x:f", r"--check no_such_module_x:f: no_such_module_x could not be imported"),
        ("none.py:f", r"--check none.py:f: no such file none.py"),
        ("math:sinus", r"--check math:sinus: math has no function sinus"),
        ("textwrap:indent", r"--check textwrap:indent: expected True, False, .* got '' on x, row 1"),
        ("textwrap:fill", r"--check textwrap:fill: expected a function of \(prompt, answer, row\), got too many"),
    ],
)
def test_a_check_that_is_none_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve(name)("", "a", {}, "x, row 1")
    assert "\n" not in str(caught.value)


OWN = """
import numpy

def right(prompt, answer, row):
    return answer == row["word"][::-1] and prompt.endswith(row["word"])

def half(prompt, answer, row):
    return numpy.float32(0.5)

def numpys(prompt, answer, row):
    return numpy.bool_(True)

def raises(prompt, answer, row):
    return row["nothing"]

def none(prompt, answer, row):
    pass

def text(prompt, answer, row):
    return "yes"

def two(prompt, answer, row):
    return 2

def nan(prompt, answer, row):
    return float("nan")

def short(answer):
    return True
"""


def test_a_check_of_ones_own_gets_prompt_answer_and_row(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    check = resolve(f"{tmp_path}/own.py:right")
    row = {"word": "abc"}
    assert [check("Reverse abc", answer, row, "x, row 1") for answer in ("cba", "abc")] == [1.0, 0.0]
    assert check("Reverse abd", "cba", row, "x, row 1") == 0
    assert resolve(f"{tmp_path}/own.py:half")("", "", row, "x, row 1") == 0.5
    assert resolve(f"{tmp_path}/own.py:numpys")("", "", row, "x, row 1") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"fails on x, row 7 and the answer 'a' \(KeyError: 'nothing'\)\.$"),
        ("none", r"expected True, False, or a share of right from 0 to 1, got NoneType on x, row 7\.$"),
        ("text", r"expected True, False, .* got 'yes' on x, row 7\.$"),
        ("two", r"expected True, False, .* got 2 on x, row 7\.$"),
        ("nan", r"expected True, False, .* got nan on x, row 7\.$"),
        ("short", r"expected a function of \(prompt, answer, row\), got too many positional arguments\.$"),
        ("missing", r"has no function missing; it has right, half, numpys"),
    ],
)
def test_a_wrong_check_of_ones_own_is_one_sentence(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UsageError, match=message) as caught:
        resolve(f"{tmp_path}/own.py:{name}")("", "a", {}, "x, row 7")
    assert str(caught.value).startswith(f"--check {tmp_path}/own.py:{name}: ")


# --- the estimators ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k([1, 0, 0, 0], 1) == 0.25
    assert pass_at_k([0, 1, 0, 1], 2) == pytest.approx(1 - 1 / 6)  # one pair of six has no right answer
    assert pass_at_k([1, 0, 0, 0], 4) == 1
    assert pass_at_k([0, 0, 0], 2) == 0


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_choices(k: int) -> None:
    right = [0.2, 1.0, 0.0, 0.7, 0.2]
    assert pass_at_k(right, k) == pytest.approx(fmean(max(few) for few in itertools.combinations(right, k)))


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_names_a_k_that_is_none(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected a number from 1 to the 2 answers, got {k}"):
        pass_at_k([1, 0], k)


def test_the_bootstrap_is_of_prompts_and_the_same_again() -> None:
    values = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25]
    found = bootstrap(values, seed=3)
    assert found == bootstrap(values, seed=3)
    uneven = [0.1, 0.35, 0.62, 0.11]
    assert bootstrap(uneven, seed=3) != bootstrap(uneven, seed=4)
    draws = np.random.default_rng(3).integers(0, 6, (1000, 6))
    means = [fmean(values[i] for i in draw) for draw in draws]
    assert found["value"] == pytest.approx(fmean(values))
    assert [found["low"], found["high"]] == pytest.approx(list(np.percentile(means, [2.5, 97.5])))
    # about 1.96 standard errors
    wide = bootstrap([0.0, 1.0] * 200, seed=0)
    assert wide["high"] - wide["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_students_interval_of_seeds() -> None:
    low, high = student([0.5, 0.7])
    assert (low, high) == (pytest.approx(0.6 - 12.706 * 0.1), pytest.approx(0.6 + 12.706 * 0.1))
    many = [0.0, 1.0] * 20
    assert student(many)[1] == pytest.approx(0.5 + 2.0227 * np.std(many, ddof=1) / 40**0.5, abs=1e-3)


def asked(right: list[float], tokens: list[int], cut: list[bool]) -> Asked:
    return Asked(right, tokens, cut, ["x"] * len(right))


def test_a_summary_is_of_each_group() -> None:
    answered = [
        asked([1, 1, 0, 0, 0], [3, 4, 4, 4, 8], [False, False, False, False, True]),
        asked([0, 0, 0, 0, 0], [9, 2, 2, 2, 2], [True, False, False, False, False]),
        asked([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [False] * 5),
    ]
    found = summary(["b", "b", "a"], answered, seed=0)
    assert list(found) == ["a", "b"]
    assert [found[g]["prompts"] for g in found] == [1, 2]
    of = {name: value["value"] for name, value in found["b"].items() if name != "prompts"}
    assert of == {
        "greedy": 0.5, "sampled": 0.125, "pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5,
        "greedy_tokens": 6, "greedy_cut": 0.5, "sampled_tokens": 3.5, "sampled_cut": 0.125,
    }  # fmt: skip
    only_greedy = summary(["a"], [asked([1], [3], [False])], seed=0)["a"]
    assert set(only_greedy) == {"prompts", "greedy", "greedy_tokens", "greedy_cut"}
    moved = checks.change(["a", "a"], answered[:2], [answered[2], answered[2]], seed=0)["a"]
    assert moved["sampled"]["value"] == pytest.approx(1 - 0.125)
    assert moved["greedy_tokens"]["value"] == pytest.approx(1 - 6)


# --- what is asked -----------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_training_whatever_shape_the_row_has(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "Name a colour."}
    red, blue = ({"role": "assistant", "content": text} for text in ("Red.", "Blue."))
    shapes: list[dict[str, Any]] = [
        {"prompt": "Name a colour.", "answer": "1"},
        {"question": "Name a colour.", "answer": "1"},
        {"prompt": [user], "completion": "Red."},
        {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Blue."},
        {"chosen": [user, red], "rejected": [user, blue]},
        {"prompt": [user], "completions": ["Red.", "Blue."], "scores": [0.1, 0.2]},
        {"conversations": [{"from": "human", "value": "Name a colour."}]},
    ]
    trained, _ = tokenize([{"prompt": "Name a colour.", "completion": "Red.", "label": True}], tokenizer, 100, "x")
    response = trained[0].responses[0]
    for number, shape in enumerate(shapes, 1):
        found, counts = prompts([shape], tokenizer, "x", numbers=[number])
        assert [p.ids for p in found] == [response.input_ids[: response.prompt_length]]
        assert (found[0].text, found[0].number, found[0].columns) == ("Name a colour.", number, shape)
        assert not counts.left_out
    found, _ = prompts(shapes, tokenizer, "x")
    assert [(p.number, p.where) for p in found] == [(1, "x, row 1")]  # one prompt, once
    with pytest.raises(UsageError, match=r"x, row 1: expected a column prompt \(or question\) to answer, got answer, group"):
        prompts([{"answer": "1", "group": "a"}], tokenizer, "x")
    for name, empty in (("prompt", ""), ("question", None)):
        with pytest.raises(UsageError, match=f"x, row 2: {name} is empty; fill it in, or take the row out"):
            prompts([{"prompt": "Name a colour."}, {name: empty, "answer": "1"}], tokenizer, "x")


# --- answers -----------------------------------------------------------------------------------------------------------------


def test_samples_are_the_same_in_any_batches_and_greedy_ones_those_of_generate(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_model(str(model_folder)).train()
    own, state = model.generation_config, torch.get_rng_state()
    asked_of = [[65 + i] * (1 + i % 5) for i in range(9)]
    how: dict[str, Any] = {"samples": 3, "temperature": 0.7, "max_new_tokens": 6, "seed": 5}
    found = greedy_and_sampled(model, tokenizer, asked_of, CPU, **how)
    assert [of[0] for of in found] == generate(model, tokenizer, asked_of, CPU, max_new_tokens=6)
    assert all(len(of) == 4 for of in found)
    assert len({tuple(answer.tokens) for of in found for answer in of}) > 20
    parts = [greedy_and_sampled(model, tokenizer, [asked_of[i]], CPU, places=[i], **how)[0] for i in (8, 2, 5)]
    assert parts == [found[i] for i in (8, 2, 5)]
    other = greedy_and_sampled(model, tokenizer, asked_of, CPU, **how | {"seed": 6})
    assert [of[0] for of in other] == [of[0] for of in found]
    assert all(one[1:] != two[1:] for one, two in zip(found, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert model.training


def test_responses_are_the_same_where_those_that_have_ended_are_dropped(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(model_folder))
    model.generation_config.eos_token_id = list(range(0, 250, 9))  # many responses are short
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    asked_of = [[65 + i] * (1 + i % 7) for i in range(40)]
    how: dict[str, Any] = {"samples": 3, "temperature": 1.0, "max_new_tokens": 24, "seed": 5}
    found = greedy_and_sampled(model, tokenizer, asked_of, CPU, **how)
    assert min(rows) <= 64 // 4  # half, and again half
    lengths = {len(answer.tokens) for of in found for answer in of}
    assert len(lengths) > 10
    assert {answer.cut for of in found for answer in of} == {True, False}
    dropping = sum(rows)
    rows.clear()
    monkeypatch.setattr(_Batches, "drops", property(lambda self: False, lambda self, value: None), raising=False)
    assert found == greedy_and_sampled(model, tokenizer, asked_of, CPU, **how)
    assert sum(rows) > 1.2 * dropping


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_drawn_from_the_model(model_folder: Path, tokenizer: PreTrainedTokenizerFast, temperature: float) -> None:
    model, count = load_model(str(model_folder)), 4000
    found = greedy_and_sampled(
        model, tokenizer, [[65, 66]], CPU, samples=count, temperature=temperature, max_new_tokens=1, seed=0
    )
    drawn = np.bincount([answer.tokens[0] for answer in found[0][1:]], minlength=len(tokenizer)) / count
    with torch.no_grad():
        expected = (model(torch.tensor([[65, 66]])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    common = expected * count > 20
    assert (np.abs(drawn - expected) <= 4 * np.sqrt(expected / count))[common].all()
    assert drawn[~common].sum() == pytest.approx(expected[~common].sum(), abs=0.03)
    assert common.sum() > 10
    assert expected.max() > 3 * expected.mean()  # not all alike
    assert found[0][0].tokens == [int(expected.argmax())]


# --- a run -------------------------------------------------------------------------------------------------------------------

GROUPED = [
    {"prompt": f"What is {a} + {a}?", "completion": f"It is {2 * a}.", "label": a % 2 == 0, "answer": f"#### {2 * a}",
     "group": "even" if a % 2 == 0 else "odd"}
    for a in range(1, 13)
]  # fmt: skip


@pytest.fixture
def flags(model_folder: Path, write_rows: Write, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run of two steps with four held-out prompts."""

    def make(output: str = "out", **more: Any) -> list[str]:
        rows = tmp_path / "rows.jsonl"
        given = {
            "model": model_folder, "dataset": rows if rows.exists() else write_rows(GROUPED), "output_dir": tmp_path / output,
            "eval_size": 4, "max_steps": 2, "batch_size": 2, "learning_rate": 0.0, "max_length": 128, "bf16": "false",
            "use_cpu": "true", "save_strategy": "no", "disable_tqdm": "true", "show_examples": 0, "report_to": "none",
            "reference_cache": tmp_path / "cache", "check": r"regex=[a-z]", "check_max_new_tokens": 5, "check_samples": 2,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in (given | more).items() if value is not None]

    return make


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, [json.loads(line) for line in (folder / "checks.jsonl").read_text().splitlines()]


def by_hand(lines: list[dict[str, Any]], stage: str, group: str) -> list[Asked]:
    names = ("right", "tokens", "cut", "answers")
    return [Asked(**{name: line[stage][name] for name in names}) for line in lines if line["group"] == group]


def test_a_run_counts_right_answers_before_and_after(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags()) == 0
    printed = capsys.readouterr().out
    metrics, lines = read(tmp_path / "out")
    right = metrics["right"]
    assert right["settings"] == {
        "check": "regex=[a-z]", "prompts": 4, "samples": 2, "temperature": 1.0, "max_new_tokens": 5, "seed": 42,
    }  # fmt: skip
    assert len(lines) == 4
    assert right["before"].keys() == {line["group"] for line in lines} <= {"even", "odd"}
    assert right["before"] == right["after"]  # at learning rate 0
    assert all(line["before"] == line["after"] for line in lines)
    shares = [of[way]["value"] for of in right["before"].values() for way in ("greedy", "sampled")]
    assert 0 < sum(shares) < len(shares)  # not all right, not all wrong
    for stage in ("before", "after"):
        for group, of in right[stage].items():
            assert of == summary([group] * of["prompts"], by_hand(lines, stage, group), seed=42)[group]
            assert of["sampled"]["value"] == fmean(
                line[stage]["sampled"] / line[stage]["samples"] for line in lines if line["group"] == group
            )
    for line in lines:
        for answer, is_right in zip(line["after"]["answers"], line["after"]["right"], strict=True):
            assert bool(re.search("[a-z]", answer)) == is_right
        assert GROUPED[line["number"] - 1]["prompt"] == line["prompt"]
        assert GROUPED[line["number"] - 1]["group"] == line["group"]
    assert all(value["value"] == 0 for of in right["change"].values() for name, value in of.items() if name != "prompts")
    steps = [log["step"] for log in metrics["log"] if any(name.startswith("right/") for name in log)]
    assert steps == [0, 2]
    assert "--check regex=[a-z]: 4 of 4 prompts of held-out rows" in printed
    assert "Right answers, after against before" in printed
    assert "columns that only --check sees: answer, group" in printed
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    group, of = next(iter(right["after"].items()))
    cell = f"{of['sampled']['value']:.1%} ({100 * of['sampled']['low']:.1f} … {100 * of['sampled']['high']:.1f})"
    assert page.count(cell) >= 2
    assert "Right answers before and after" in page
    assert f"sampled | {cell} | {cell} |" in card
    assert f"right answers, sampled, {group}" in card


def test_without_a_check_nothing_is_asked(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(check=None, check_max_new_tokens=None, check_samples=None)) == 0
    assert "right" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not (tmp_path / "out" / "checks.jsonl").exists()
    assert "Right answers" not in (tmp_path / "out" / "report.html").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert "columns that are not used: answer, group" in capsys.readouterr().out


def test_an_adapter_answers_too(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Before it is trained as the base model does, and after it as the folder that is saved."""
    adapter = {"use_peft": "true", "learning_rate": 0.1, "warmup_steps": 0}
    assert main(flags("base", max_steps=1)) == 0
    assert main(flags("adapter", **adapter)) == 0
    base, tuned = (read(tmp_path / name)[1] for name in ("base", "adapter"))
    assert [line["before"] for line in tuned] == [line["before"] for line in base]
    assert any(line["before"]["answers"] != line["after"]["answers"] for line in tuned)


def test_a_check_changes_no_weight(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    moving = {"learning_rate": 0.01, "save_strategy": "no"}
    assert main(flags("with", check_steps=1, **moving)) == 0
    assert main(flags("without", check=None, check_max_new_tokens=None, check_samples=None, **moving)) == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert one == other
    metrics, lines = read(tmp_path / "with")
    assert [log["step"] for log in metrics["log"] if any(k.startswith("right/") for k in log)] == [0, 1, 2]
    assert list(metrics["right"]["during"]) == ["1"]
    assert any(line["before"]["answers"] != line["after"]["answers"] for line in lines)


def test_other_prompts_are_asked(
    flags: Callable[..., list[str]], write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_rows(
        [{"question": f"What is {a} + {a}?", "answer": f"{2 * a}"} for a in range(9, 21)], name="questions.jsonl"
    )
    assert main(flags(check="number", check_dataset=questions, check_rows=7, eval_size=0, check_samples=0)) == 0
    printed = capsys.readouterr().out
    metrics, lines = read(tmp_path / "out")
    assert re.search(
        r"--check number: 7 of 12 prompts of \S+questions.jsonl, in 1 group; [1-4] of them are trained on", printed
    )
    assert set(metrics["right"]["after"]) == {"all"}
    assert set(metrics["right"]["after"]["all"]) == {"prompts", "greedy", "greedy_tokens", "greedy_cut"}
    numbers = [line["number"] for line in lines]
    assert len(numbers) == 7
    assert sorted(numbers) == numbers != list(range(1, 8))  # a draw, not the first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"check": "number", "rows": [{k: v for k, v in r.items() if k != "answer"} for r in GROUPED]},
         r"rows.jsonl, row \d+: --check number compares with the column answer, got none; add it"),
        ({"check": "exact", "rows": [r | {"answer": " "} for r in GROUPED]}, r"row \d+: --check exact .* got an empty one"),
        ({"check": "number", "rows": [r | {"answer": "many"} for r in GROUPED]},
         r"row \d+: answer: expected a number in it for --check number, got 'many'"),
        ({"eval_size": 0}, r"--check: no rows are held out, so there is nothing to ask; pass --check_dataset FILE"),
        ({"check_max_new_tokens": 250}, r"--check_max_new_tokens 250: the model was made for 256 tokens in all, and the short"),
        ({"check": None, "check_steps": 1}, r"--check_\w+: has no effect without --check; add it, or leave it out"),
        ({"check_samples": -1}, "--check_samples: expected a number of samples, or 0, got -1"),
        ({"check_temperature": 0}, "--check_temperature: expected more than 0"),
        ({"check_steps": 0}, "--check_steps: expected a number of optimizer steps of at least 1, got 0"),
        ({"check_dataset": "none.jsonl"}, "none.jsonl: no such file"),
        ({"check": "json:loads"}, r"--check json:loads: expected a function of \(prompt, answer, row\)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_weights_are_read(
    flags: Callable[..., list[str]],
    write_rows: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    message: str,
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(run, "load_model", load)
    more = dict(more)
    write_rows(more.pop("rows", GROUPED))
    assert main(flags(**more)) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


def test_prompts_that_leave_no_room_are_counted(
    flags: Callable[..., list[str]], write_rows: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_rows([{"prompt": "a" * n} for n in (10, 20, 230)], name="questions.jsonl")
    assert main(flags(check_dataset=questions, check_max_new_tokens=30)) == 0
    assert "2 of 3 prompts of" in (printed := capsys.readouterr().out)
    assert ", 1 left out as too long for an answer" in printed


def test_a_resumed_run_keeps_what_was_measured_before(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 0}
    assert main(flags(max_steps=1, **saving)) == 0
    first = json.loads((tmp_path / "out" / "checkpoint-1" / checking.BEFORE).read_text())
    _, lines = read(tmp_path / "out")
    assert [asked["answers"] for asked in first["before"]] == [line["before"]["answers"] for line in lines]
    assert not (tmp_path / "out" / checking.BEFORE).exists()

    def ask(*args: Any) -> list[Asked]:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "ask_untrained", ask)
        assert main(flags(max_steps=3, resume_from_checkpoint="auto", **saving)) == 0
        again, resumed = read(tmp_path / "out")
        assert [line["before"] for line in resumed] == [line["before"] for line in lines]
        assert any(line["before"]["answers"] != line["after"]["answers"] for line in resumed)
        assert [log["step"] for log in again["log"] if any(k.startswith("right/") for k in log)] == [0, 3]
        with pytest.raises(AssertionError, match="asked again"):  # other questions than the first part's
            main(flags(max_steps=3, resume_from_checkpoint="auto", check_samples=1, **saving))


def test_what_a_check_raises_after_training_leaves_the_model(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "calls = []\ndef later(*asked):\n    calls.append(asked)\n    return None if len(calls) > 13 else True\n"
    (tmp_path / "own.py").write_text(own)  # one try, and 4 prompts with 3 answers each
    assert main(flags(check=f"{tmp_path}/own.py:later")) == 2
    assert "got NoneType on" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- the other commands ------------------------------------------------------------------------------------------------------


def arm(name: str, seed: int, value: float, before: float | None = None) -> dict[str, Any]:
    def of(share: float) -> Mapping[str, Any]:
        interval = {"value": share, "low": share - 0.1, "high": share + 0.1}
        return {"all": {"prompts": 9, "greedy": interval, "sampled": interval, "pass@1": interval, "pass@2": interval}}

    right = {"after": of(value)} | ({} if before is None else {"before": of(before)})
    step = {"step": 0 if before is not None else 1}
    return {
        "name": name, "seed": seed, "curve": [step | {"probe_perplexity": 1.0}], "right": right, "before": None, "after": [],
        "train_seconds": 1.0, "tokens_per_second": 1.0, "peak_gib": 1.0, "arguments": [],
    }  # fmt: skip


def test_compare_has_right_answers_as_columns() -> None:
    found = summaries([arm("bnf", 0, 0.5, before=0.3), arm("bnf", 1, 0.7), arm("dpo", 0, 0.2)])
    heading = "right, all, sampled"
    assert found[START][heading] == pytest.approx({"mean": 0.3, "min": 0.3, "max": 0.3, "runs": 1, "low": 0.2, "high": 0.4})
    assert found["bnf"][heading] == {"mean": 0.6, "min": 0.5, "max": 0.7, "runs": 2, "low": 0.0, "high": 1.0}
    assert found["dpo"][heading] == pytest.approx({"mean": 0.2, "min": 0.2, "max": 0.2, "runs": 1, "low": 0.1, "high": 0.3})
    assert "right, all, pass@2" in found["bnf"]
    assert "right, all, pass@1" not in found["bnf"]
    table = markdown([arm("bnf", 0, 0.5)])
    assert "50.0% (40.0 … 60.0)" in table
    assert "right" not in markdown([arm("bnf", 0, 0.5) | {"right": {}}])


def test_analyze_counts_right_answers_of_every_model(
    model_folder: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *("--policy", model_folder, "--reference", model_folder, "--data", write_rows(GROUPED), "--names", "p"),
        *("--check", "regex=[a-z]", "--check_samples", 2, "--check_max_new_tokens", 5, "--check_rows", 5, "--seed", 3),
    ]
    assert analyze([*map(str, given), "--output_dir", str(tmp_path / "out")]) == 0
    right = json.loads((tmp_path / "out" / "analysis.json").read_text())["right"]
    assert list(right["models"]) == ["reference", "p"]
    assert right["models"]["p"] == right["models"]["reference"]  # one model twice
    assert right["settings"]["prompts"] == len(right["prompts"]) == 5
    for group, of in right["models"]["p"].items():
        greedy = [line["p"]["greedy"] for line in right["prompts"] if line["group"] == group]
        assert of["greedy"] == bootstrap(greedy, seed=3)
    assert "Right answers, greedy and sampled" in capsys.readouterr().out
    assert analyze([*map(str, given[:8]), "--check_dataset", "x.jsonl"]) == 2
    assert "--check_dataset: has no effect without --check" in capsys.readouterr().err


# --- several processes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # three runs, two of them in two processes
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_find_what_one_finds(
    forks: ForkServerContext, flags: Callable[..., list[str]], tmp_path: Path, fsdp: bool
) -> None:
    chosen = dict(flag[2:].split("=", 1) for flag in flags(learning_rate=0.01, check_steps=1))
    chosen.pop("output_dir")
    launcher = Launcher(forks, {f"--{name}": value for name, value in chosen.items()}, tmp_path)
    one = launcher(tmp_path / "one")
    two = launcher(tmp_path / "two", processes=2, fsdp=fsdp, per_device_train_batch_size="1")
    assert (one.code, two.codes) == (0, (0, 0)), one.printed + two.printed
    found = [log for log in logged(tmp_path / "one") if any(name.startswith("right/") for name in log)]
    assert [log["step"] for log in found] == [0, 1, 2]
    assert_same_run(tmp_path / "two", tmp_path / "one")
