"""python -m bnf_train.rounds: what a kill leaves, what is refused, and a report whose numbers are those of the files."""

import doctest
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import fmean
from typing import Any

import children
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train.errors import UsageError
from bnf_train.model.generate import greedy_and_sampled
from bnf_train.rounds import files as of_files
from bnf_train.rounds import process, report, run, settings, stages
from bnf_train.rounds.__main__ import main, parser
from bnf_train.rounds.files import Folder
from bnf_train.sample import flags as of_sample

WORDS = ("sun", "rain", "wind", "snow", "hail", "fog", "dew", "ice")
PROMPTS = [{"prompt": word, "answer": word[0], "group": "abc"[i % 2]} for i, word in enumerate(WORDS)]
CHECK = "def right(prompt, answer, row):\n    return {}\n"


@pytest.fixture
def flags(model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Of two short rounds, with a check that finds some answers right."""

    def given(output: str, *more: str, right: str = "sum(map(ord, answer)) % 3 > 0") -> list[str]:
        check = tmp_path / "check.py"
        check.write_text(CHECK.format(right))
        asked = write_rows([row | {"prompt": f"{row['prompt']}?"} for row in PROMPTS[:4]], "asked.jsonl")
        return [
            *("--rounds=2", f"--model={model_folder}", f"--dataset={write_rows(PROMPTS, 'prompts.jsonl')}"),
            *(f"--check={check}:right", f"--check_dataset={asked}", "--check_samples=2", "--check_max_new_tokens=5"),
            *("--samples=3", "--max_new_tokens=5", "--temperature=1", "--per_device_eval_batch_size=2", "--seed=3"),
            *("--batch_size=4", "--learning_rate=1e-3", "--save_steps=1", "--bf16=false", "--use_cpu=true"),
            *("--eval_size=0.3", "--empty=drop", "--disable_tqdm=true", f"--output_dir={tmp_path / output}", *more),
        ]

    return given


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages run in this process; the names of those that did."""
    return patched(monkeypatch)


def patched(patch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []

    def here(name: str, folder: Path, stage: Callable[..., None], *arguments: Any) -> None:
        ran.append(name)
        stage(*arguments)

    patch.setattr(run, "run_stage", here)
    return ran


def in_child(arguments: list[str]) -> None:
    """In a process that is to be killed; whose children would be killed later."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        main(arguments)


def content(folder: Path) -> dict[str, bytes]:
    """All that two runs have in common: every file but those that say where they are and when they were written."""
    names = ("rounds.json", "rounds.md", "*/rows.jsonl", "*/answers.jsonl", "*/checks.jsonl", "*/right.json")
    names += ("*/trained.json", "*/prompts.jsonl", "*/model/*.safetensors")
    where = (str(folder).encode(), folder.name.encode())
    found = {str(p.relative_to(folder)): p.read_bytes() for name in names for p in folder.glob(name)}
    for name in found:
        for word in where if not name.endswith("safetensors") else ():
            found[name] = found[name].replace(word, b"")
    return found


def test_the_numbers_of_the_report_are_those_of_the_files(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(flags("out")) == 0
    assert len(at_once) == 7
    found = json.loads((output / "rounds.json").read_text())["rounds"]
    assert [one["round"] for one in found] == [0, 1, 2]
    for number in (1, 2):
        one, folder = found[number], Folder(output, number)
        labels: dict[str, list[bool]] = {}
        for row in map(json.loads, folder.rows.read_text().splitlines()):
            assert row["label"] == (sum(map(ord, row["completion"])) % 3 > 0)
            labels.setdefault(row["prompt"], []).append(row["label"])
        flat = [label for of in labels.values() for label in of]
        assert one["rows"] == {"preferred": sum(flat), "dispreferred": len(flat) - sum(flat)}
        assert 0 < sum(flat) < len(flat)
        answers = [json.loads(line) for line in folder.answers.read_text().splitlines()[1:]]
        assert one["samples"]["prompts"] == len(answers) == len(labels) == 8
        assert one["samples"]["all_right"] == sum(min(of["values"]) == 1 for of in answers) / 8
        assert one["samples"]["all_wrong"] == sum(max(of["values"]) == 0 for of in answers) / 8
        held_out = json.loads((folder.model / "metrics.json").read_text())["held_out"]
        for label in ("preferred", "dispreferred"):
            assert one["weight"][label] == held_out.get(f"eval_bnf/weight_mean/{label}")
        assert one["weight"]["preferred"] is not None
        assert not list(folder.model.glob("checkpoint-*"))
    assert found[1]["seeds"] != found[2]["seeds"]
    assert len({value for one in found[1:] for value in one["seeds"].values()}) == 4

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    models = (model_folder, Folder(output, 1).model, Folder(output, 2).model)
    for one, model in zip(found, models, strict=True):
        lines = [json.loads(line) for line in Folder(output, one["round"]).checks.read_text().splitlines()]
        assert one["right"].keys() == {"a", "b"}
        for group in ("a", "b"):
            of, asked = one["right"][group], [line for line in lines if line["group"] == group]
            assert of["prompts"] == len(asked) == 2
            assert of["sampled"]["value"] == pytest.approx(fmean(fmean(line["right"][1:]) for line in asked))
            assert of["sampled"]["low"] <= of["sampled"]["value"] <= of["sampled"]["high"]
            assert of["sampled_tokens"]["value"] == pytest.approx(fmean(fmean(line["tokens"][1:]) for line in asked))
            assert one["entropy"][group] == pytest.approx(entropy(model, tokenizer, asked), rel=1e-4)
    text = capsys.readouterr().out
    table = text[text.index("Right answers to held-out prompts") :]
    assert f"{found[2]['weight']['preferred']:.3f}" in table
    assert f"{found[2]['entropy']['a']:.3f}" in table
    assert f"{found[2]['right']['b']['sampled']['value']:.1%}" in (output / "rounds.md").read_text()
    assert "round-2/model/report.html" in (output / "report.html").read_text()


def entropy(model: Path, tokenizer: Any, lines: list[dict[str, Any]]) -> float:
    """Of the model at each token of its sampled answers, from the full logits."""
    values: list[float] = []
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for line in lines:
        chat = [{"role": "user", "content": line["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        how = {"samples": 2, "temperature": 1.0, "max_new_tokens": 5, "seed": 3, "places": [line["number"] - 1]}
        drawn = greedy_and_sampled(loaded, tokenizer, [prompt], torch.device("cpu"), **how)[0]
        assert [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in drawn] == line["answers"]
        for answer in drawn[1:]:
            with torch.no_grad():
                logits = loaded(input_ids=torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1].double()
            logp = logits.log_softmax(-1)
            values += (-(logp.exp() * logp).sum(-1)).tolist()
    return fmean(values)


def test_a_kill_between_any_two_stages_changes_nothing_and_rounds_may_grow(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(flags("whole", "--prompts_per_round=5")) == 0
    expected, stage = content(tmp_path / "whole"), run.run_stage
    at_once.clear()

    class Killed(BaseException):
        pass

    def one_stage(*arguments: Any) -> None:
        stage(*arguments)
        raise Killed

    monkeypatch.setattr(run, "run_stage", one_stage)
    for rounds in (1, 1, 1, 1, 2, 2, 2):
        with pytest.raises(Killed):
            main(flags("parts", "--prompts_per_round=5", f"--rounds={rounds}"))
    assert len(at_once) == 7
    monkeypatch.setattr(run, "run_stage", stage)
    assert main(flags("parts", "--prompts_per_round=5")) == 0
    assert len(at_once) == 7
    found = content(tmp_path / "parts")
    assert found.keys() == expected.keys()
    assert {"rounds.json", "round-2/model/model.safetensors", "start/checks.jsonl"} <= found.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    first, second = (tmp_path / "parts" / f"round-{number}" / "prompts.jsonl" for number in (1, 2))
    asked = [json.loads(line)["prompt"] for path in (first, second) for line in path.read_text().splitlines()]
    assert asked == [*WORDS, *WORDS[:2]]  # the next five, going round


def test_a_process_killed_while_it_samples_or_trains_changes_nothing(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, forks: ForkServerContext
) -> None:
    assert main(flags("whole")) == 0
    folder = Folder(tmp_path / "parts", 1)
    partial = folder.rows.with_suffix(".partial.jsonl")
    for moment in (
        lambda: partial.exists() and len(partial.read_bytes().splitlines()) > 2,  # a part of the answers is there
        lambda: any(folder.model.glob("checkpoint-*")),  # a part of the steps is taken
    ):
        killed = forks.Process(target=in_child, args=(flags("parts"),))
        killed.start()
        until = time.monotonic() + children.HANGS
        while not moment():
            assert killed.is_alive()
            assert time.monotonic() < until
        killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert not folder.trained.exists()
    assert main(flags("parts")) == 0
    found, expected = content(tmp_path / "parts"), content(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.mark.slow  # a dozen starts of an interpreter for the command, and one for each stage
def test_the_command_killed_at_random_changes_nothing(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bnf_train.rounds"]
    environment = os.environ | {"PYTHONPATH": children.PYTHONPATH}
    began = time.monotonic()
    subprocess.run([*command, *flags("whole")], env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, draw = time.monotonic() - began, random.Random(0)
    killed = 0
    for number in range(8):
        process = subprocess.Popen(
            [*command, *flags("parts")], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(draw.uniform(0.1, 0.5) * seconds)
        except subprocess.TimeoutExpired:
            killed += 1
            if number % 2:
                process.kill()  # its stage goes on for a moment, and the next command waits for the end of that
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert killed >= 2
    subprocess.run([*command, *flags("parts")], env=environment, check=True, stdout=subprocess.DEVNULL)
    found, expected = content(tmp_path / "parts"), content(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.mark.parametrize(
    ("right", "says", "left"),
    [
        ("True", "answers are right, so it trains on preferred responses alone", "dispreferred"),
        ("False", "answers are wrong, so it trains on dispreferred responses alone", "preferred"),
    ],
)
def test_a_round_of_one_label_says_so_and_trains_on_it(
    right: str, says: str, left: str, flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(flags("out", "--rounds=1", right=right)) == 0
    assert says in capsys.readouterr().out
    assert says in (tmp_path / "out" / "report.html").read_text()
    one = json.loads((tmp_path / "out" / "rounds.json").read_text())["rounds"][1]
    assert one["rows"][left] == 0
    assert one["steps"] > 0
    assert one["samples"]["all_right" if right == "True" else "all_wrong"] == 1


def test_pairs_of_a_round_whose_answers_are_all_alike_are_one_sentence(
    flags: Callable[..., list[str]], at_once: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags("out", "--objective=dpo", "--form=pairs", right="True")) == 2
    message = capsys.readouterr().err
    assert "no row comes of these answers" in message
    assert message.count("\n") == 1


def test_another_command_line_is_refused_with_the_flag_and_both_values(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags("out", "--rounds=1", "--keep=last")) == 0
    began = content(tmp_path / "out")
    for more, flag, before in (
        (["--learning_rate=2e-3"], "--learning_rate 0.002:", "begun with 0.001"),
        (["--temperature=0.7"], "--temperature 0.7:", "begun with 1.0"),
        (["--objective=tnpo", "--beta=0.3"], "--objective tnpo:", "begun with bnf"),
        (["--seed=4"], "--seed 4:", "begun with 3"),
        (["--prompts_per_round=4"], "--prompts_per_round 4:", "begun with 0"),
        (["--check=exact"], "--check exact:", "check.py:right"),
    ):
        assert main(flags("out", "--rounds=1", *more)) == 2
        message = capsys.readouterr().err
        assert flag in message
        assert before in message
        assert message.count("\n") == 1
    arguments = flags("out", "--rounds=1")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPTS[0] | {"answer": "else"}) + "\n")
    assert main(arguments) == 2
    assert "has other rows than when" in capsys.readouterr().err
    assert content(tmp_path / "out") == began


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ref_model=x"], "--ref_model: has no place in rounds, because each round's reference"),
        (["--use-peft"], "--use_peft: has no place in rounds"),
        (["--server=http://localhost"], "--server: has no place in rounds"),
        (["--output", "rows.jsonl"], "--output: has no place in rounds"),
        (["--sample=3"], "--sample: no such flag"),
        (["--rounds=0"], "--rounds: expected a whole number of at least 1, got 0"),
        (["--rounds=many"], "--rounds: expected int, got 'many'"),
        (["--temperature=0"], "--temperature 0: 3 answers to a prompt would be the same"),
        (["--objective=dpo"], "add --form pairs"),
        (["--prompts_per_round=9"], "--prompts_per_round 9: "),
        (["--check_dataset=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_sampled(
    more: list[str], words: str, flags: Callable[..., list[str]], at_once: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags("out", *more)) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not at_once


def test_without_a_check_or_in_a_folder_in_use_nothing_begins(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag for flag in flags("out") if not flag.startswith("--check")]) == 2
    assert "--check is missing" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(flags("out")) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert main(flags("out/thesis.tex")) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    with process.alone(tmp_path / "other"):
        assert main(flags("other")) == 2
    assert "is at work there" in capsys.readouterr().err
    assert not at_once


def test_prompts_to_be_asked_are_kept_where_no_others_are_named(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    given = settings.read(parser(), [flag for flag in flags("out") if not flag.startswith("--check_dataset")])
    begun = settings.begin(given, tmp_path / "out" / "questions.jsonl")
    assert begun.again == 0
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    answered = [prompt.text for prompt in begun.prompts]
    assert len(kept) == 2  # 0.3 of 8
    assert sorted([*kept, *answered]) == sorted(WORDS)


def test_prompts_that_are_trained_on_and_asked_are_counted(
    flags: Callable[..., list[str]], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    both = write_rows([*PROMPTS[2:5], {"prompt": "moon", "answer": "m"}], "both.jsonl")
    given = settings.read(parser(), flags("out", f"--check_dataset={both}"))
    assert settings.begin(given, tmp_path / "out" / "questions.jsonl").again == 3


def test_a_file_has_flags_of_every_kind(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = dict(flag[2:].split("=", 1) for flag in flags("out"))
    path.write_text(yaml.safe_dump({name: yaml.safe_load(value) for name, value in values.items()} | {"objective": "tnpo"}))
    given = settings.read(parser(), [f"--config={path}", "--samples=4"])
    assert (given.rounds, given.drawing["samples"], given.drawing["max_new_tokens"]) == (2, 4, 5)
    config = given.config()
    assert (config.objective, config.learning_rate, config.save_steps) == ("tnpo", 1e-3, 1)
    path.write_text(path.read_text() + "samplles: 3\n")
    with pytest.raises(UsageError, match="unknown key samplles"):
        settings.read(parser(), [f"--config={path}"])


def test_a_stage_has_a_process_of_its_own_and_what_it_says_comes_back(
    tmp_path: Path, forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.multiprocessing, "get_context", lambda method: forks)
    process.run_stage("round 1, sampling", tmp_path, write_pid, tmp_path / "pid")
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    with pytest.raises(UsageError, match="round 1, training: lower it"):
        process.run_stage("round 1, training", tmp_path, refuse)
    with pytest.raises(UsageError, match="round 1, training: its process was killed"):
        process.run_stage("round 1, training", tmp_path, die)


def write_pid(path: Path) -> None:
    path.write_text(str(os.getpid()))


def refuse() -> None:
    raise UsageError("lower it.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_doctests() -> None:
    for module in (settings, stages, report, of_files, of_sample, sys.modules[parser.__module__]):
        assert doctest.testmod(module).failed == 0
    assert sum(doctest.testmod(module).attempted for module in (settings, stages, of_sample)) >= 3
