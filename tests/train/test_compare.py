"""python -m bnf_train.compare: arms in processes of their own, resumable, and a report that says what came out."""

import json
import os
import pickle
import re
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from preference_rows import PAIRS
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train.__main__ import main as train
from bnf_train.compare import figures, run
from bnf_train.compare.__main__ import main, read_options
from bnf_train.compare.arm import Measures, answers, paragraphs, perplexity
from bnf_train.compare.report import START, columns, markdown, summaries, write
from bnf_train.compare.run import Arm
from bnf_train.data import Response, Row
from bnf_train.errors import Interrupted, UsageError
from bnf_train.flags import parse
from bnf_train.model.head import attach_log_odds_head

SECONDS = ("train_seconds", "tokens_per_second", "peak_gib")


def compare(arguments: list[str]) -> None:
    run.compare(*read_options(arguments))


def flags(model_folder: Path, rows: Path, output: Path, *more: str) -> list[str]:
    own = ("--max_length=128", "--max_steps=2", "--batch_size=2", "--learning_rate=1e-3", "--bf16=false", "--use_cpu=true")
    first = ("--seeds=0", "--responses=2", "--max_new_tokens=4", f"--model={model_folder}", f"--dataset={rows}")
    return [*first, f"--output_dir={output}", "--eval_size=2", "--disable_tqdm=true", *own, *more]


@pytest.fixture
def forked(forks: ForkServerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms begin in processes that have imported everything; without it as they do for a user."""
    monkeypatch.setattr("bnf_train.compare.process.multiprocessing.get_context", lambda method: forks)


@pytest.mark.usefixtures("rendered", "forked")
def test_arms_run_once_and_the_report_is_of_what_they_left(
    model_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    output, rows = tmp_path / "out", write_rows(PAIRS)
    probe = tmp_path / "probe.txt"
    probe.write_text("Rivers run to the sea.\n\nBread is baked.\n")
    given = flags(model_folder, rows, output, f"--probe={probe}")
    with pytest.raises(UsageError, match="1 of 2 arms failed"):
        compare(["--arms", "bnf", "dpo learning_rate=1e38", *given])
    report = json.loads((output / "compare.json").read_text())
    bnf, failed = report["runs"]
    assert "lower --learning_rate" in failed["failed"]
    assert [point["step"] for point in bnf["curve"]] == [0, 1, 2]
    start, end = bnf["curve"][0], bnf["curve"][-1]
    assert start["eval_logp_shift_per_token/preferred"] == pytest.approx(0, abs=1e-5)
    assert end["eval_logp_shift_per_token/preferred"] > end["eval_logp_shift_per_token/dispreferred"]
    assert len(bnf["before"]) == len(bnf["after"]) == 2
    assert all(answer["tokens"] <= 4 for answer in bnf["after"])
    assert report["arms"][START]["probe perplexity"]["mean"] == start["probe_perplexity"]
    for name in ("report.html", "compare.md", "curves.png", "tradeoff.png"):
        assert (output / name).stat().st_size > 500
    page = (output / "report.html").read_text()
    assert not re.search(r"(src|href)=.?http", page)
    assert "1e38" in page
    assert not list(output.glob("arms/*/*.safetensors"))

    # the finished arm stays; the failed one is replaced by one that can run
    finished = (output / "arms/bnf-seed0/arm.json").stat().st_mtime_ns
    compare(["--arms", "bnf", "dpo", *given])
    assert (output / "arms/bnf-seed0/arm.json").stat().st_mtime_ns == finished
    arms = json.loads((output / "compare.json").read_text())["arms"]
    assert list(arms) == [START, "bnf", "dpo"]
    with pytest.raises(UsageError, match="run with other flags"):
        compare(["--arms", "bnf", *given, "--weight_decay=0.1"])


def test_an_arm_is_the_run_of_bnf_train_with_its_flags(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The comparison adds no training semantics of its own: the same loss curve as python -m bnf_train."""
    rows = write_rows(PAIRS)
    given = flags(model_folder, rows, tmp_path / "out")
    children.run("-m", "bnf_train.compare", "--arms", "simpo beta=3", *given)
    arm = json.loads((tmp_path / "out/compare.json").read_text())["runs"][0]
    alone = [x for x in given[5:] if not x.startswith("--output_dir")]
    paths = [f"--model={model_folder}", f"--dataset={rows}", f"--output_dir={tmp_path / 'alone'}"]
    assert train(["--objective=simpo", "--beta=3", "--seed=0", *paths, "--no_reference_cache", *alone]) == 0
    log = json.loads((tmp_path / "alone/metrics.json").read_text())["log"]
    assert arm["losses"] == [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.usefixtures("forked")
def test_arms_side_by_side_are_those_in_turn_and_seeds_have_their_own_files(
    model_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """--jobs changes nothing that is measured; {seed} is the arm's; no probe, no perplexity; the start once a seed."""
    for seed in (0, 1):
        write_rows(PAIRS[seed:]).rename(tmp_path / f"rows{seed}.jsonl")
    given = [*flags(model_folder, tmp_path / "rows{seed}.jsonl", tmp_path / "out")[1:], "--probe=none", "--responses=0"]
    arms = ["--arms", "dpo learning_rate=1e38", "bnf", "simpo", "--seeds", "0", "1"]
    results = {}
    for jobs in (1, 3):
        output = tmp_path / f"out{jobs}"
        with pytest.raises(UsageError, match="2 of 6 arms failed"):
            compare([*arms, *given, f"--output_dir={output}", f"--jobs={jobs}"])
        runs = json.loads((output / "compare.json").read_text())["runs"]
        assert [(of["name"].split()[0], of["seed"]) for of in runs] == [
            (name, seed) for seed in (0, 1) for name in ("dpo", "bnf", "simpo")
        ]
        finished = [of for of in runs if "failed" not in of]
        results[jobs] = [(of["curve"][-1]["eval_loss"], of["losses"]) for of in finished]
        assert {of["seed"] for of in finished if of["curve"][0]["step"] == 0} == {0, 1}
        start = json.loads((output / "compare.json").read_text())["arms"][START]
        assert start[next(iter(columns()))]["runs"] == 2
        assert not any("probe_perplexity" in point for of in finished for point in of["curve"])
        assert not (output / "tradeoff.png").exists()
        assert all(f"--dataset={tmp_path}/rows{of['seed']}.jsonl" in of["arguments"] for of in runs)
    assert results[1] == results[3]
    assert results[1][0] != results[1][2]  # other rows


@pytest.mark.usefixtures("forked")
def test_a_killed_arm_is_one_line_and_the_others_go_on(
    model_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import multiprocessing, os\n\n\ndef dies(log_odds, batch):\n    if multiprocessing.parent_process():\n"
        "        os._exit(9)\n    return batch.mean(log_odds)\n"
    )
    with pytest.raises(UsageError, match="1 of 2 arms failed"):
        compare(["--arms", f"{own}:dies", "bnf", *flags(model_folder, write_rows(PAIRS), tmp_path / "out"), "--probe=none"])
    killed, bnf = json.loads((tmp_path / "out/compare.json").read_text())["runs"]
    assert "killed" in killed["failed"]
    assert bnf["curve"][0]["step"] == 0  # it measured the start in place of the one that died


def test_rates_are_drawn_for_each_group_of_right_answers() -> None:
    def arm(name: str, seed: int, target: float, before: float | None = None) -> dict[str, Any]:
        def right(value: float | None) -> dict[str, Any]:
            return {} if value is None else {group: {"sampled": {"value": value}} for group in ("target", "others")}

        return run_of(name, seed, 1.0, right={"after": right(target), "before": right(before)})

    runs = [arm(f"bnf lr={rate}", seed, 0.5 + 100 * rate + seed / 10, 0.4) for rate in (1e-4, 1e-3) for seed in (0, 1)]
    runs.append(arm("dpo beta=1 lr=0.0001", 0, 0.2))
    figure = figures.drawn(runs)["rates"]
    assert [axis.get_title() for axis in figure.axes] == ["Right answers: target", "Right answers: others"]
    bnf, dpo, before = figure.axes[0].lines
    assert list(bnf.get_xdata()) == [1e-4, 1e-3]
    assert list(bnf.get_ydata()) == pytest.approx([0.56, 0.65])
    assert list(dpo.get_ydata()) == [0.2]
    assert before.get_ydata()[0] == pytest.approx(0.4)
    assert "rates" not in figures.drawn([arm("bnf", 0, 0.5)])


def test_perplexity_is_that_of_the_full_logits(model_folder: Path) -> None:
    texts = ["Rivers run to the sea.", "Bread is baked", "x"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp = model(input_ids=ids).logits.double().log_softmax(-1)
        losses += (-logp[0, :-1].gather(1, ids[0, 1:, None])).flatten().tolist()
    attach_log_odds_head(model)
    config = parse([f"--model={model_folder}", "--dataset=x.jsonl", "--bf16=false", "--use_cpu=true", "--max_length=64"])
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp().item()
    assert perplexity(model, tokenizer, texts, config, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_answers_are_greedy_and_end_where_the_turn_does(model_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    config = parse([f"--model={model_folder}", "--dataset=x.jsonl", "--bf16=false", "--use_cpu=true", "--max_length=64"])
    rows = [Row("", [Response([*prompt, 1, 2], len(prompt), True)]) for prompt in [*prompts, prompts[0]]]
    given = answers(model, tokenizer, rows, config, Measures(Path("unused"), responses=8, max_new_tokens=6))
    assert len(given) == 2  # distinct prompts
    for prompt, answer in zip(prompts, given, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer["answer"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert answer["tokens"] == len(ids) - len(prompt)


def test_answers_end_at_every_end_of_turn_and_repetition_is_not_penalised(model_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    config = parse([f"--model={model_folder}", "--dataset=x.jsonl", "--bf16=false", "--use_cpu=true", "--max_length=64"])
    rows, measures = [Row("", [Response([5, 6, 7, 1], 3, True)])], Measures(Path("unused"), responses=1, max_new_tokens=6)
    (plain,) = answers(model, tokenizer, rows, config, measures)
    greedy = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.repetition_penalty = 50.0
    assert answers(model, tokenizer, rows, config, measures) == [plain]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, greedy]
    (ended,) = answers(model, tokenizer, rows, config, measures)
    assert ended["tokens"] == 1 < plain["tokens"]
    assert model.generation_config.repetition_penalty == 50.0  # what is saved with the model


def test_a_finished_arm_was_run_and_measured_alike_or_is_refused(tmp_path: Path) -> None:
    def arm(shared: dict[str, Any]) -> Arm:
        return Arm("bnf", 0, tmp_path, ["--objective=bnf"], shared)

    def left(text: str) -> None:
        (tmp_path / "arm.json").write_text(text)

    left("")  # of a machine that went down
    assert arm({}).finished() is None
    left(json.dumps({"arguments": ["--objective=bnf"], "shared": {"max_steps": 2, "responses": 8}}))
    assert arm({"max_steps": 2, "responses": 8}).finished()
    for other in ({"max_steps": 3, "responses": 8}, {"responses": 8}, {"max_steps": 2, "responses": 0}):
        with pytest.raises(UsageError, match=r"this arm was run with (max_steps 2|responses 8)"):
            arm(other).finished()


def test_a_stopped_arm_stops_the_comparison_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = pickle.loads(pickle.dumps(Interrupted(15, "saved x")))  # as it comes from an arm's process

    def stopped(*_: Any) -> None:
        raise stop

    monkeypatch.setattr("bnf_train.compare.run.compare", stopped)
    assert main(["--arms", "bnf"]) == 143
    assert "the same command goes on" in capsys.readouterr().err


def run_of(name: str, seed: int, shift: float, **more: Any) -> dict[str, Any]:
    def point(step: int, shift: float) -> dict[str, Any]:
        return {"step": step, "eval_logp_shift_per_token/preferred": shift, "probe_perplexity": 10.0 + step}

    curve = [point(0, 0.0)] * (name == "bnf") + [point(4, shift)]
    facts: dict[str, Any] = {"before": None, "after": [], **dict.fromkeys(SECONDS, 1.0)}
    return {"name": name, "seed": seed, "arguments": [], "curve": curve, **facts, **more}


def test_summaries_are_means_over_seeds_with_the_smallest_and_the_largest(tmp_path: Path) -> None:
    runs = [run_of("bnf", 0, 1.0), run_of("bnf", 1, 3.0), run_of("dpo | x", 0, -1.0)]
    runs.append({"name": "kto", "seed": 0, "arguments": [], "failed": "it <b>burst</b>"})
    arms = summaries(runs)
    column = next(iter(columns()))
    assert arms["bnf"][column] == {"mean": 2.0, "min": 1.0, "max": 3.0, "runs": 2}
    assert list(arms) == [START, "bnf", "dpo | x"]
    assert arms[START]["seconds, evaluations included"] is None
    text = markdown(runs)
    assert "+2.000 (+1.000 … +3.000)" in text
    assert "dpo \\| x" in text
    assert "kto, seed 0: failed" in text
    write(tmp_path, runs)
    assert "&lt;b&gt;" in (tmp_path / "report.html").read_text()
    write(tmp_path, runs[-1:])  # nothing finished yet


def test_one_seed_that_is_no_number_makes_the_arm_none(tmp_path: Path) -> None:
    runs = [run_of("bnf", 0, 1.0), run_of("bnf", 1, float("nan"))]
    assert "nan" in markdown(runs).splitlines()[-1]
    assert "1.000" not in markdown(runs).splitlines()[-1]
    write(tmp_path, runs)
    strict = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert strict["arms"]["bnf"][next(iter(columns()))]["mean"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--arms is missing"),
        (["--arms", "beta=2"], "expected an objective and flags"),
        (["--arms", "bnf", "bnf"], "given twice"),
        (["--arms", "bnfx"], "the nearest is bnf"),
        (["--arms", "dpo betta=2"], "--betta"),
        (["--arms", "bnf", "--probe", "nowhere.txt"], "--probe nowhere.txt"),
        (["--arms", "bnf", "--seeds", "one"], "--seeds"),
        (["--arms", "bnf", "--learning_rates", "fast"], "--learning_rates"),
        (["--arms", ""], "expected an objective and flags"),
        (["--arms", "dpo beta='0.1"], "expected an objective and flags"),
        (["--arms", "bnf", "--seeds", "-1"], "--seeds"),
        (["--arms", "bnf", "--responses", "-1"], "--responses"),
        (["--arms", "bnf", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out" / "arms").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="new or empty folder"):
        compare(["--arms", "bnf", "--output_dir", str(tmp_path)])
    with pytest.raises(UsageError, match="new or empty folder"):
        compare(["--arms", "bnf", "--output_dir", str(tmp_path / "thesis.tex")])
    with pytest.raises(UsageError, match="paragraphs"):
        paragraphs(Path(os.devnull))
