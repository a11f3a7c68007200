"""Several processes, DDP or FSDP2: another number of them goes on from a checkpoint, every metric is that of one process."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launched import Ended, Launcher
from preference_rows import PAIRS, SINGLES
from safetensors.torch import load_file
from same_run import assert_same_run

from bnf_train.__main__ import main
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError
from bnf_train.training import checkpoint
from bnf_train.training.tryout import try_out

# 7 rows by 4 are 2 steps an epoch, the second one of 3 rows: a process has a micro-batch without any
FLAGS = {
    "--bf16": "false",
    "--max_length": "100",
    "--eval_strategy": "steps",
    "--eval_steps": "3",
    "--batch_size": "4",
    "--per_device_train_batch_size": "1",
    "--per_device_eval_batch_size": "2",
    "--num_train_epochs": "3",
    "--learning_rate": "0.01",
    "--warmup_steps": "0",
    "--save_strategy": "steps",
    "--save_steps": "3",
    "--disable_tqdm": "true",
}
KINDS = [False, True]
IN_ORDER = {"train_sampling_strategy": "sequential"}


@pytest.fixture
def train(forks: ForkServerContext, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Launcher:
    rows, held_out = write_rows(PAIRS[:7]), write_rows(PAIRS[5:], "held_out.jsonl")
    flags = {"--model": str(model_folder), "--dataset": str(rows), "--eval_dataset": str(held_out)}
    return Launcher(forks, FLAGS | flags, tmp_path)


def ok(ended: Ended) -> None:
    assert set(ended.codes) == {0}, ended.printed


def assert_no_pickle(folder: Path) -> None:
    """Every file is text, an image or safetensors; none of them has the signs of a pickle or of a zip archive."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.safetensors" for path in files)
    for path in files:
        assert path.suffix in (".json", ".jinja", ".safetensors", ".md", ".html", ".png"), path
        if path.suffix != ".png":
            data = path.read_bytes()
            assert not data.startswith((b"PK", b"\x80")), path  # zip (torch.save), pickle of protocol 2 or later
            if path.suffix == ".safetensors":
                json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            else:
                data.decode()


@pytest.mark.parametrize("fsdp", KINDS, ids=["ddp", "fsdp2"])
def test_another_number_of_processes_goes_on(fsdp: bool, train: Launcher, tmp_path: Path) -> None:
    goes_on(train, tmp_path, fsdp)


@pytest.mark.slow  # ten launches
@pytest.mark.parametrize("fsdp", KINDS, ids=["ddp", "fsdp2"])
def test_another_number_of_processes_goes_on_with_an_adapter(fsdp: bool, train: Launcher, tmp_path: Path) -> None:
    goes_on(train, tmp_path, fsdp, use_peft="true", lora_r="4")


def goes_on(train: Launcher, tmp_path: Path, fsdp: bool, **flags: str) -> None:
    """From the checkpoint of one process in two and the other way round; rows in the same order, every metric the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    ok(train(one, **flags))
    ok(train(two, processes=2, fsdp=fsdp, **flags))
    assert_same_run(two, one)
    for before, processes in ((one, 2), (two, 1)):
        after = tmp_path / f"then-{processes}"
        after.mkdir()
        shutil.copytree(before / "checkpoint-3", after / "checkpoint-3")
        ended = train(after, processes=processes, fsdp=fsdp and processes > 1, resume_from_checkpoint="True", **flags)
        ok(ended)
        assert "Going on from" in ended.printed
        # measured once after every start; transformers' mean over steps of which it has seen the last three
        assert_same_run(after, one, but=("weights_moved", "train_loss"))
        assert_no_pickle(after)


def test_killed_in_two_processes_and_resumed_the_weights_are_the_same(train: Launcher, tmp_path: Path) -> None:
    """DDP within an optimizer step, FSDP2 while a checkpoint is written; with dropout, so that random numbers count."""
    survive(train, tmp_path, False, [("micro-batch", 9, 1)])
    survive(train, tmp_path, True, [("file in checkpoint-6", 6, 0)])


@pytest.mark.slow  # twenty launches of two processes
@pytest.mark.parametrize("fsdp", KINDS, ids=["ddp", "fsdp2"])
def test_killed_in_two_processes_many_times(fsdp: bool, train: Launcher, tmp_path: Path) -> None:
    """Of 12 micro-batches of each process, and of the first one's 80 files; each moment once."""
    draw = random.Random(7)
    moments = [("micro-batch", at, n % 2) for n, at in enumerate(draw.sample(range(1, 13), 5))]
    survive(train, tmp_path, fsdp, moments + [("file", at, 0) for at in draw.sample(range(1, 81), 5)])


def survive(train: Launcher, folder: Path, fsdp: bool, moments: list[tuple[str, int, int]]) -> None:
    """Each moment's process is killed there, the other one with it; resumed, the run ends as the undisturbed one."""
    config = folder / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.001}))
    ok(train(folder / f"undisturbed-{fsdp}", processes=2, fsdp=fsdp))
    expected = load_file(folder / f"undisturbed-{fsdp}" / "model.safetensors")
    for what, at, where in moments:
        output = folder / f"killed-{fsdp}-{what.split('/')[0].replace(' ', '-')}-{at}-{where}"
        ended = train(output, what, at, where=where, processes=2, fsdp=fsdp)
        assert -signal.SIGKILL in ended.codes, ended.printed
        ok(train(output, processes=2, fsdp=fsdp, resume_from_checkpoint="auto"))
        found = load_file(output / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (what, at, name)


@pytest.mark.parametrize(("processes", "fsdp"), [(1, False), (2, False), (2, True)], ids=["one", "ddp", "fsdp2"])
def test_sigterm_to_everybody(processes: int, fsdp: bool, train: Launcher, tmp_path: Path) -> None:
    """To the trainer and its data workers, and as by a scheduler and a launcher twice: a checkpoint, and exit code 143."""
    # steps of two rows, so that workers are still there in the second one
    flags = {"batch_size": "2", "dataloader_num_workers": str(processes), "dataloader_multiprocessing_context": "fork"}
    ended = train(
        tmp_path / "out", "micro-batch", 4 // processes, signal.SIGTERM, group=True, where=processes - 1,
        processes=processes, fsdp=fsdp, **flags,
    )  # fmt: skip
    assert set(ended.codes) == {143}, ended.printed
    assert "the same command with --resume_from_checkpoint True goes on from there" in ended.printed
    (kept,) = checkpoint.checkpoints(tmp_path / "out")
    assert checkpoint.damage(kept) is None
    assert checkpoint.read_state(kept / "optimizer.safetensors")["state"]


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "bf16": (PAIRS[:7], {"bf16": "true"}),
    "lora": (PAIRS[:7], {"use_peft": "true", "lora_r": "4"}),
    "lora-bf16": (PAIRS[:7], {"use_peft": "true", "lora_r": "4", "bf16": "true"}),
    "preferred": ([row | {"label": True} for row in SINGLES[:7]], {}),
    # in this order every second row is another process's
    "dispreferred-on-one": ([row | {"label": n % 2 == 0} for n, row in enumerate(SINGLES[:7])], IN_ORDER),
    "one-row": (SINGLES[:1], {}),
    "kto": (SINGLES[:7], {"objective": "kto"}),
    # by the loss of the worst one, which is not the last
    "best": (PAIRS[:7], {"load_best_model_at_end": "true", "metric_for_best_model": "eval_loss", "greater_is_better": "true"}),
}


# 4, 1, 3 and 2 responses to a prompt, not side by side: the groups cross the batches of 4 rows that a process computes
SHARED = [
    {"prompt": f"Which number comes after {prompt} and before {prompt + 2}?", "completion": f"{n}" * n, "label": n % 2 == 0}
    for n, prompt in enumerate([3, 5, 7, 3, 9, 7, 3, 9, 7, 3], start=1)
]
IN_FOURS = {"batch_size": "8", "per_device_train_batch_size": "4", "per_device_eval_batch_size": "4"}


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])  # one shows it
def test_two_processes_that_share_prompts_are_one(
    fsdp: bool, train: Launcher, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    flags = {"dataset": str(write_rows(SHARED, "shared.jsonl"))} | IN_FOURS
    for output, processes in (("one", 1), ("two", 2)):
        ended = train(tmp_path / output, processes=processes, fsdp=fsdp and processes > 1, **flags)
        ok(ended)
        assert "Prompts are computed once" in ended.printed
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow  # two processes for each of a dozen cases
@pytest.mark.parametrize("fsdp", KINDS, ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, fsdp: bool, train: Launcher, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Uneven numbers of rows in all of them; in the last one process never has any."""
    rows, flags = CASES[case]
    flags = flags | {"dataset": str(write_rows(rows, "case.jsonl"))}
    ok(train(tmp_path / "one", **flags))
    ok(train(tmp_path / "two", processes=2, fsdp=fsdp, **flags))
    # in bf16 the same products in another order differ by its spacing
    assert_same_run(tmp_path / "two", tmp_path / "one", *((5e-2, 3e-2) if "bf16" in case else ()))
    assert_no_pickle(tmp_path / "two")


FSDP2 = "--use_fsdp --fsdp_version 2 --fsdp_state_dict_type FULL_STATE_DICT"
FSDP1 = "--use_fsdp --fsdp_version 1 --fsdp_sync_module_states false --fsdp_cpu_ram_efficient_loading false"
PARALLEL = f"{FSDP2} --use_parallelism_config --parallelism_config"
REFUSED = {  # the launcher's flags, what is said
    "tensors": (f"{PARALLEL}_tp_size 2", "tp_size 2: each process needs"),
    "sequences": (f"{PARALLEL}_cp_size 2", "cp_size 2: each process needs"),
    "ulysses": (f"{PARALLEL}_sp_size 2", "sp_size 2: each process needs"),
    "fsdp1": (FSDP1, "fsdp_version 1: only FSDP2"),
    "shards": (f"{FSDP2} --fsdp_state_dict_type SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT"),
    "nonsense": (f"{FSDP2} --fsdp_activation_checkpointing_offload true", "error: --fsdp, or the launcher's variables: "),
}


@pytest.mark.parametrize(("launcher", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_a_sentence(
    launcher: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read: neither the model nor the rows are there."""
    given = f"--num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no {launcher} script.py"
    told = prepare_multi_gpu_env(launch_command_parser().parse_args(given.split()))
    nowhere = ["--model", "/no/such/model", "--dataset", "/no/such/rows.jsonl", "--output_dir", str(tmp_path / "out")]
    with mock.patch.dict(os.environ, told):  # TrainingArguments sets some, too
        assert main(nowhere) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "/no/such" not in said
    assert said.count("\n") == 1


def test_a_config_of_ones_own_says_it_too(model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    config = BNFConfig(
        model=str(model_folder), dataset=str(write_rows(PAIRS)), output_dir=str(tmp_path / "out"),
        parallelism_config=ParallelismConfig(cp_size=2),
    )  # fmt: skip
    with pytest.raises(UsageError, match="cp_size 2: each process needs"):
        try_out(config)
