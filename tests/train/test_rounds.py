"""python -m bnf_train.rounds: what a kill leaves, what is refused, and a report whose numbers are those of the files."""

import doctest
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import fmean
from typing import Any

import children
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train.errors import Interrupted, UsageError
from bnf_train.model.generate import greedy_and_sampled
from bnf_train.rounds import files as of_files
from bnf_train.rounds import process, report, run, settings, stages
from bnf_train.rounds.__main__ import main, parser
from bnf_train.rounds.files import Folder
from bnf_train.sample import flags as of_sample
from bnf_train.sample import run as of_sampling
from bnf_train.training import checkpoint

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


class Killed(BaseException):
    """In place of a signal, where stages run in this process."""


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
    assert "begin a new --output_dir" in message  # another --form would be refused in this one
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


def test_prompts_that_are_trained_on_and_asked_are_counted_and_the_report_says_so(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    both = write_rows([*PROMPTS[2:5], {"prompt": "moon", "answer": "m"}], "both.jsonl")
    given = settings.read(parser(), flags("both", f"--check_dataset={both}"))
    assert settings.begin(given, tmp_path / "both" / "questions.jsonl").again == 3
    assert main(flags("out", "--rounds=1")) == 0
    page = tmp_path / "out" / "report.html"
    assert "held-out prompts, never trained on and the same each time" in page.read_text()
    report.write(tmp_path / "out", 1, 3)
    assert "3 of the prompts to be asked are trained on, too." in page.read_text()
    assert "never trained on" not in page.read_text()


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        ((), True),
        ((".lock",), True),
        ((".lock", ".stage-lock", "questions.jsonl", ".begun.json.tmp"), True),
        (("begun.json", "round-1"), True),
        ((".git", "thesis.tex"), False),
        (("questions.jsonl",), False),
        ((".lock", "questions.jsonl", "thesis.tex"), False),
    ],
)
def test_a_folder_is_gone_on_with_only_where_rounds_have_begun_it(names: tuple[str, ...], ours: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "out" / name).mkdir(parents=True)
    if ours:
        settings.check_folder(tmp_path / "out")
    else:
        with pytest.raises(UsageError, match="expected a new or empty folder"):
            settings.check_folder(tmp_path / "out")


def killed_while_it_samples(arguments: list[str]) -> None:
    """Ends once the answers to the first prompts are kept."""
    with pytest.MonkeyPatch.context() as patch:
        add = of_sampling.Partial.add

        def first(self: Any, *more: Any) -> None:
            add(self, *more)
            raise Killed

        patch.setattr(of_sampling.Partial, "add", first)
        with pytest.raises(Killed):
            main(arguments)


def test_a_template_writes_the_day_on_which_the_folder_was_begun(
    flags: Callable[..., list[str]], at_once: list[str], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_folder / "chat_template.jinja"
    path.write_text("{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + path.read_text())
    draw, seen = of_sampling.from_model, list[str]()

    def spied(model: Any, tokenizer: Any, prompts: Any, *more: Any, **how: Any) -> Any:
        seen.extend(tokenizer.decode(prompt.ids) for prompt in prompts)
        return draw(model, tokenizer, prompts, *more, **how)

    monkeypatch.setattr(of_sampling, "from_model", spied)
    killed_while_it_samples(flags("out", "--rounds=1", "--template_date=2020-02-03"))
    assert main(flags("out", "--rounds=1")) == 0  # on another day
    assert len(seen) == 2 * len(PROMPTS)
    assert all("03 Feb 2020" in text for text in seen)


def test_what_is_computed_at_once_may_change(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_while_it_samples(flags("out", "--rounds=1"))
    less = ["--per_device_eval_batch_size=1", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    less += ["--tokens_per_pass=100", "--packing=false", "--gradient_checkpointing=true"]
    assert main(flags("out", "--rounds=1", *less)) == 0
    assert "3 answers are drawn at once, 6 were" in capsys.readouterr().out
    first = json.loads(Folder(tmp_path / "out", 1).answers.read_text().partition("\n")[0])
    assert first["arguments"]["batch_size"] == 3


def test_rules_for_rows_are_those_of_training(
    flags: Callable[..., list[str]], at_once: list[str], tmp_path: Path, write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = flags("out", "--rounds=1")
    write_rows([*PROMPTS[:5], {"prompt": 5}, {"prompt": "<|im_start|>user\nmoon<|im_end|>\n"}], "prompts.jsonl")
    assert main(arguments) == 2
    assert "row 6" in (message := capsys.readouterr().err)
    assert "pass --malformed drop" in message
    assert main([*arguments, "--malformed=drop", "--already_rendered=as_is"]) == 0
    assert "1 rows dropped as malformed (--malformed drop): row 6" in capsys.readouterr().out
    assert "moon" in Folder(tmp_path / "out", 1).rows.read_text()


def test_a_full_disk_is_a_sentence_that_fits_the_rounds(
    tmp_path: Path, forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.multiprocessing, "get_context", lambda method: forks)
    with pytest.raises(UsageError, match=r"^round 1, training: the disk is full; make room, and the same command goes on\.$"):
        process.run_stage("round 1, training", tmp_path, fill_the_disk, tmp_path / "model")
    with pytest.raises(UsageError, match="the disk is full; make room"), process.alone(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_the_disk(output: Path) -> None:
    with checkpoint.naming_a_full_disk(output):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_reference_cache_in_the_file_is_used(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, used = tmp_path / "run.yaml", list[Any]()

    def training(config: Any) -> None:
        used.append(config.reference_cache)
        raise Killed

    monkeypatch.setattr(stages, "run", training)
    folder = Folder(tmp_path / "out", 1)
    for text in (f"reference_cache: {tmp_path / 'cache'}", "reference_cache: null"):
        path.write_text(text)
        given = settings.read(parser(), [*flags("out"), f"--config={path}"])
        with pytest.raises(Killed):
            stages.train_round(given, "model", folder, "2020-02-03")
    assert used == [str(tmp_path / "cache"), str(folder.reference)]


def test_sampling_takes_device_and_precision_of_training(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[Any]()

    def sampling(flags: Any, console: Any, setting: Any) -> None:
        found.append(setting)

    monkeypatch.setattr(stages, "sample", sampling)
    given = settings.read(parser(), [flag for flag in flags("out") if not flag.startswith("--bf16")])
    for dtype, bf16, fp16, autocast in (
        ("float32", False, False, None), ("float32", True, False, torch.bfloat16), ("bfloat16", False, True, torch.float16)
    ):  # fmt: skip
        config = given.config()
        config.dtype, config.bf16, config.fp16 = dtype, bf16, fp16
        monkeypatch.setattr(settings.Settings, "config", lambda self, config=config: config)
        stages.sample_round(given, "model", Folder(tmp_path / "out", 1), "2020-02-03")
        setting = found.pop()
        assert (setting.device, setting.dtype, setting.autocast) == (torch.device("cpu"), getattr(torch, dtype), autocast)


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


def test_a_list_of_prompts_in_a_file_has_one_name(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    path, source = tmp_path / "run.yaml", str(tmp_path / "prompts.jsonl")
    arguments = [flag for flag in flags("out") if not flag.startswith("--dataset")]
    for name in ("dataset", "prompts"):
        path.write_text(yaml.safe_dump({name: [source]}))
        assert settings.read(parser(), [*arguments, f"--config={path}"]).source == source
        path.write_text(yaml.safe_dump({name: [source, source]}))
        with pytest.raises(UsageError, match=r"^--dataset: expected one file of prompts, got 2; put them into one\.$"):
            settings.read(parser(), [*arguments, f"--config={path}"])


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


@pytest.fixture
def survives() -> Iterator[None]:
    """A SIGTERM that nobody takes does not end the tests."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


@contextmanager
def terminated_once(there: Callable[[], bool]) -> Iterator[None]:
    """SIGTERM to this process once something is there."""

    def wait() -> None:
        until = time.monotonic() + children.HANGS
        while not there() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_sigterm_in_training_is_a_checkpoint_and_the_same_command_goes_on(
    flags: Callable[..., list[str]], tmp_path: Path, forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch,
    survives: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(process.multiprocessing, "get_context", lambda method: forks)
    said = list[str]()

    def spied(*arguments: Any) -> None:
        try:
            process.run_stage(*arguments)
        except Interrupted as stop:
            said.append(str(stop))
            raise

    monkeypatch.setattr(run, "run_stage", spied)
    arguments, folder = flags("out", "--rounds=1", "--num_train_epochs=300"), Folder(tmp_path / "out", 1)
    with terminated_once(lambda: bool(checkpoint.checkpoints(folder.model))):
        assert main(arguments) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "Stopped; the same command goes on from here.\n"
    last = checkpoint.checkpoints(folder.model)[-1]
    assert said[0].startswith("SIGTERM: saved ")
    assert checkpoint.damage(last) is None
    assert not folder.trained.exists()


def test_sigterm_to_another_stage_or_between_two_is_the_end(
    tmp_path: Path, forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch, survives: None
) -> None:
    monkeypatch.setattr(process.multiprocessing, "get_context", lambda method: forks)
    pid = tmp_path / "pid"
    with terminated_once(pid.exists), pytest.raises(Interrupted, match="SIGTERM: the same command goes on") as stopped:
        process.run_stage("round 1, sampling", tmp_path, write_pid_and_sleep, pid)
    assert stopped.value.code == 143
    with pytest.raises(Interrupted), process.alone(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGTERM)


def write_pid_and_sleep(path: Path) -> None:
    write_pid(path)
    time.sleep(20)


def test_doctests() -> None:
    for module in (settings, stages, report, of_files, of_sample, sys.modules[parser.__module__]):
        assert doctest.testmod(module).failed == 0
    assert sum(doctest.testmod(module).attempted for module in (settings, stages, of_sample)) >= 3
