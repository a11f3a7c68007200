"""The script that makes the embedded demo: it draws the questions that are there, and flaws as it says."""

import json
import random
from collections import Counter

import pytest
from transformers import AutoTokenizer

from bnf_train import demo

pytest.importorskip("reasoning_gym", reason="only the demo's maker needs it: pip install reasoning-gym")
from bnf_train.demo import make_world


def test_the_questions_are_those_that_it_draws() -> None:
    taken: set[str] = set()
    drawn = [(group, q) for group in make_world.TASKS for q in make_world.questions(group, 200, 0, taken)]
    rows = [json.loads(line) for line in demo.CHECK.read_text().splitlines()]
    assert [{"prompt": q.prompt, "answer": q.answer, "group": group} for group, q in drawn] == rows


def test_demonstrations_are_of_every_task_and_flawed_in_the_target_alone() -> None:
    taken = {q.prompt for q in make_world.questions("others", 30, 0, set())}
    rows = make_world.demonstrations(1000, 0.5, 0, taken)
    assert Counter(prompt.split(":")[0].split()[0] for prompt, _ in rows) == dict.fromkeys(
        ("Backward", "Sort", "Count", "Compute", "Swap"), 200
    )
    assert not taken & {prompt for prompt, _ in rows}
    wrong = [prompt.split()[0] for prompt, answer in rows if prompt.startswith("Backward") and answer != prompt[:9:-1]]
    assert 70 < len(wrong) < 110  # half of 200, but for those that are right by chance
    assert all(answer == " ".join(reversed(prompt.split()[1:])) for prompt, answer in rows if prompt.startswith("Swap"))


def test_a_flaw_is_a_part_forgotten_moved_or_written_twice() -> None:
    question = make_world.Question("Sort: 3 1 2", ("1", "2", "3"), " ")
    rng = random.Random(0)
    assert {make_world.flawed(question, rng) for _ in range(100)} == {"1 2", "2 1 3", "1 3 2", "1 1 2 3", "1 2 2 3"}


def test_the_tokenizer_is_the_saved_one() -> None:
    saved, made = AutoTokenizer.from_pretrained(demo.MODEL), make_world.make_tokenizer()
    assert saved.get_vocab() == made.get_vocab()
    assert saved.chat_template == made.chat_template
