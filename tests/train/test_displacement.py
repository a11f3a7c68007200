"""The alarm of falling preferred responses: when it is raised, in a run and in one that goes on, and where it is kept."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from preference_rows import PAIRS

from bnf_train.__main__ import main
from bnf_train.training.displacement import SHIFT, TOKENS, DisplacementAlarm, alarms

WORDS = "became less likely at 3 evaluations in a row"


def history_of(shifts: Sequence[float], tokens: int = 7) -> list[dict[str, Any]]:
    """Evaluations at steps 2, 4, …, with a training log before each."""
    logs = [({"loss": 0.5, "step": step}, {SHIFT: x, TOKENS: tokens, "step": step}) for step, x in enumerate(shifts, start=1)]
    return [{**log, "step": 2 * log["step"]} for pair in logs for log in pair]


@pytest.mark.parametrize(
    ("shifts", "from_reference", "steps"),
    [
        ([-0.1, -0.2, -0.3], True, [6]),  # the first is below the reference's own 0
        ([-0.1, -0.2, -0.3], False, []),  # what it was before is not known
        ([-0.1, -0.2, -0.3, -0.4], False, [8]),
        ([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7], True, [6]),  # once
        ([-0.1, -0.2, -0.2, -0.3, -0.4], True, []),  # a tie is no fall
        ([-0.1, -0.2, -0.1, -0.2, -0.3], True, []),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], True, []),  # falls, above the reference
        ([0.5, 0.4, 0.3, 0.2, -0.1, -0.2], True, [10]),
        ([-0.1, -0.2, -0.3, -0.2, -0.3, -0.4, -0.5], True, [6]),  # less low is not recovered
        ([-0.1, -0.2, -0.3, 0.0, -0.1, -0.2, -0.3], True, [6, 14]),
        ([float("nan"), -0.1, float("nan"), -0.2, -0.3], True, []),
        ([], True, []),
    ],
)
def test_when_it_is_raised(shifts: list[float], from_reference: bool, steps: list[int]) -> None:
    found = alarms(history_of(shifts), from_reference)
    assert [alarm.steps[-1] for alarm in found] == steps
    for alarm in found:
        assert alarm.steps == [alarm.steps[-1] - 4, alarm.steps[-1] - 2, alarm.steps[-1]]
        assert alarm.shifts == [shifts[step // 2 - 1] for step in alarm.steps]


def said_by(history: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, first: int = 1, **options: Any) -> list[int]:
    """Steps at which the callback speaks, as the history grows from its `first` entries on."""
    args = SimpleNamespace(**{"ref_model": None, "objective": "dpo"} | options)
    said = []
    for end in range(first, len(history) + 1):
        if SHIFT not in history[end - 1]:
            continue
        state = SimpleNamespace(
            log_history=history[:end],
            global_step=history[end - 1]["step"],
            is_world_process_zero=options.get("first_process", True),
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            DisplacementAlarm().on_evaluate(args, state, None)
        assert len(caplog.records) <= 1
        said += [state.global_step] * len(caplog.records)
    return said


def test_it_is_said_once_by_the_first_process_and_not_again_by_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    history = history_of([-0.1, -0.2, -0.3, -0.4, 0.1, -0.1, -0.2, -0.3])
    assert said_by(history, caplog) == [6, 16]
    assert said_by(history, caplog, first_process=False) == []
    assert said_by(history, caplog, ref_model="another") == [8, 16]  # where it started is not known
    # every evaluation has a callback of its own here, as after a resume: what was logged before counts, and is not said again
    assert said_by(history[:8], caplog, first=5) == [6]
    assert said_by(history[:8], caplog, first=7) == []
    again = [*history[:6], history[5], *history[6:8]]  # --eval_on_start of a resumed run evaluates step 6 once more
    assert said_by(again, caplog) == [6]
    other_rows = [*history[:4], {SHIFT: -9.0, TOKENS: 3, "step": 4}, *history[4:8]]  # a part of the held-out rows
    assert said_by(other_rows, caplog) == [6]


def test_it_says_the_numbers_and_what_to_do() -> None:
    (alarm,) = alarms(history_of([-0.1, -0.2, -0.31]), True)
    text = alarm.sentence("dpo")
    for part in (WORDS, "-0.1000, -0.2000, -0.3100 nats per token", "steps 2, 4, 6", "--learning_rate", "--objective bnf"):
        assert part in text
    assert "\n" not in text
    assert "--objective" not in alarm.sentence("bnf")


SINGLES = [{"prompt": row["prompt"], "completion": row["chosen"], "label": label} for label in (True, False) for row in PAIRS]
FLAGS = {
    "--bf16": "false",
    "--max_length": "100",
    "--eval_strategy": "steps",
    "--eval_steps": "1",
    "--batch_size": "4",
    "--per_device_train_batch_size": "4",
    "--warmup_steps": "0",
    "--max_steps": "4",
    "--learning_rate": "0.01",
    "--lr_scheduler_type": "constant",
    "--objective": "log_likelihood",
    "--disable_tqdm": "true",
}


@pytest.mark.parametrize("label", [False, True], ids=["pushed-down", "pushed-up"])
def test_a_run_says_it_and_keeps_it(
    label: bool, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pushed down, or up, alone; held out are the same answers, preferred."""
    train, held_out = (
        write_rows([r for r in SINGLES if r["label"] is x], f"{x}-{i}.jsonl") for i, x in enumerate((label, True))
    )
    files = {"--model": model_folder, "--dataset": train, "--eval_dataset": held_out, "--output_dir": tmp_path / "out"}
    with caplog.at_level(logging.WARNING):
        assert main([str(x) for flag in (FLAGS | files).items() for x in flag]) == 0
    said = [record.message for record in caplog.records if WORDS in record.message]
    assert len(said) == (0 if label else 1)
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written.get("alarms", []) == said
    assert ("likelihood displacement" in (tmp_path / "out/report.html").read_text()) is not label
    shares = [log["eval_displacement/preferred"] for log in written["log"] if "eval_loss" in log]
    assert len(shares) == 4
    assert (shares[-1] > 0.5) is not label


def test_a_resumed_run_goes_on_counting(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of the three evaluations are in the checkpoint."""
    train, held_out = (write_rows([r for r in SINGLES if r["label"] is x], f"{x}.jsonl") for x in (False, True))
    files = {"--model": model_folder, "--dataset": train, "--eval_dataset": held_out, "--output_dir": tmp_path / "out"}
    flags = [str(x) for flag in (FLAGS | files | {"--save_strategy": "steps", "--save_steps": 2}).items() for x in flag]
    with caplog.at_level(logging.WARNING):
        assert main(flags) == 0
        (said,) = [record.message for record in caplog.records if WORDS in record.message]
        for resumed, again in (("checkpoint-2", [said]), ("checkpoint-4", [])):
            caplog.clear()
            assert main([*flags, "--resume_from_checkpoint", str(tmp_path / "out" / resumed)]) == 0
            assert [record.message for record in caplog.records if WORDS in record.message] == again
            assert json.loads((tmp_path / "out/metrics.json").read_text())["alarms"] == [said]
