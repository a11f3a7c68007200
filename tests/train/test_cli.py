"""What the commands share: what is printed of a failure, the exit code, and how flags are read."""

from pathlib import Path

import pytest
import torch

from bnf_train import cli
from bnf_train.errors import Interrupted, UsageError


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("--rows 0: expected at least 1."), 2, "error: --rows 0: expected at least 1.\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried."),
            2,
            "error: out of memory (CUDA out of memory. Tried); lower --rows.\n",
        ),
        (Interrupted(15, "saved x"), 143, "SIGTERM: saved x\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
    ],
)
def test_a_failure_is_a_sentence_and_an_exit_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str], failure: cli.Failure) -> None:
        failure.out_of_memory = lambda: "lower --rows."
        raise error

    assert cli.run(command, ["--rows", "0"]) == code
    assert capsys.readouterr().err == says
    assert cli.run(command, ["--rows", "0", "--debug"]) == code
    shown = capsys.readouterr().err
    assert shown.endswith(says)
    assert ("Traceback" in shown) == (code == 2)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), MemoryError(), SystemExit(3)])
def test_what_no_flag_mends_is_not_swallowed(error: BaseException) -> None:
    def command(arguments: list[str], failure: cli.Failure) -> None:
        raise error

    with pytest.raises(type(error)):
        cli.run(command, [])


def test_a_command_says_how_a_stopped_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: list[str], failure: cli.Failure) -> None:
        failure.stopped = "The same command goes on."
        raise Interrupted(2, "one arm's own words") if arguments else KeyboardInterrupt

    assert cli.run(command, []) == cli.run(command, ["x"]) == 130
    assert capsys.readouterr().err == 2 * "The same command goes on.\n"


def test_flags_come_from_the_command_line_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sys.argv", ["bnf-train", "--seed", "3"])
    assert cli.run(lambda arguments, failure: seen.append((arguments, failure.debug))) == 0
    assert cli.run(lambda arguments, failure: seen.append((arguments, failure.debug)), ("--debug",)) == 0
    assert seen == [(["--seed", "3"], False), (["--debug"], True)]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["--debug"], []),
        (["--debug", "--seed", "3"], ["--seed", "3"]),
        (["--seed", "3", "--debug"], ["--seed", "3"]),
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"]),
        (["--debug=underflow_overflow", "--debug"], ["--debug=underflow_overflow"]),
        ([], []),
    ],
)
def test_debug_with_a_value_is_transformers(given: list[str], left: list[str]) -> None:
    assert cli.without_debug(given) == left


def test_the_parser_names_the_flag_and_what_was_meant() -> None:
    parser = cli.Parser(prog="python -m x")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--side", choices=["chosen", "rejected"])
    assert parser.read(["--batch-size=3", "--side", "chosen"]).batch_size == 3
    known, rest = parser.read_known(["--batch-size", "-3", "--other-flag=a-b", "a-b"])
    assert (known.batch_size, rest) == (-3, ["--other_flag=a-b", "a-b"])
    for flags, words in (
        (
            ["--batch_sise", "3"],
            "--batch_sise: no such flag; the nearest is --batch_size (python -m x --help lists every flag).",
        ),
        (["--batch", "3"], "--batch: no such flag"),  # no abbreviations
        (["--batch_size", "many"], "--batch_size: expected int, got 'many' (python -m x --help lists every flag)."),
        (["--side", "choosen"], "; the nearest is chosen (python"),
        (["rows.jsonl"], "rows.jsonl: expected a flag, which begins with --"),
    ):
        with pytest.raises(UsageError) as caught:
            parser.read(flags)
        assert words in str(caught.value)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    cli.check_new_folder(tmp_path / "none")
    cli.check_new_folder(tmp_path / "empty")
    for used in (tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(UsageError, match="expected a new or empty folder; remove it or pass another"):
            cli.check_new_folder(used)
