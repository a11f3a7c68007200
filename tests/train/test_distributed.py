"""Two processes, DDP or FSDP2, compute what one computes, and leave the same model folder; did weights move at all."""

import importlib.util
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from launched import environment
from preference_rows import PAIRS, SINGLES
from safetensors.torch import load_file, save_file
from same_run import assert_same_run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from bnf_train.__main__ import main
from bnf_train.training.checkpoint import checkpoints
from bnf_train.training.weights_moved import WeightsMoved

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "bnf_train" / "configs").glob("*.yaml"))
# of the two-process runs: tied, bf16, more flags
RUNS: list[tuple[Any, ...]] = [(True, False), (False, True), (False, False, "--use_peft", "--lora_r", "4")]


@pytest.fixture
def flags(tokenizer: PreTrainedTokenizerFast, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run of six steps of four pairs; the model is made on first use."""
    rows = write_rows(PAIRS)

    def make(output: str, processes: int, tied: bool, bf16: bool, *more: str) -> list[str]:
        folder = tmp_path / ("tied" if tied else "untied")
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            vocab = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": tied}
            LlamaForCausalLM(LlamaConfig(**sizes, **vocab, initializer_range=0.3)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return [
            *("--model", str(folder), "--dataset", str(rows), "--output_dir", str(tmp_path / output)),
            *("--batch_size", "4", "--per_device_train_batch_size", str(4 // processes), "--num_train_epochs", "3"),
            *("--learning_rate", "1e-2", "--warmup_steps", "0", "--eval_size", "0", "--max_length", "128"),
            *("--bf16", str(bf16), "--save_strategy", "no", "--disable_tqdm", "true", *more),
        ]

    return make


def launch(configuration: str, *command: str, machines: int = 1) -> str:
    """`accelerate launch` with a file of ours, of two processes on CPUs; returns what they wrote to stderr."""
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", str(machines)]
    launcher += ["--config_file", str(ROOT / "bnf_train" / "configs" / configuration), "--main_process_ip", "127.0.0.1"]
    for attempt in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = ([*launcher, "--main_process_port", port, "--machine_rank", str(rank), *command] for rank in range(machines))
        try:
            said = children.together(list(ranks), CUDA_VISIBLE_DEVICES="")
        except pytest.fail.Exception as failure:  # another program was faster to take the port
            if attempt == 4 or "EADDRINUSE" not in str(failure):
                raise
        else:
            return "".join(streams.err for streams in said)
    raise AssertionError


def launch_runs(configuration: str, folder: Path, *runs: dict[str, Any], machines: int = 1) -> None:
    """Several runs, one after the other, in the two processes of one launch."""
    (folder / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)))
    launch(configuration, str(Path(__file__).with_name("runs_on_cpu.py")), str(folder / "runs.jsonl"), machines=machines)


def trace(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "metrics.json").read_text())["log"] if "loss" in log]


def same_run(folder: Path, expected: Path, file: str = "model.safetensors", loss: float = 1e-5, weights: float = 1e-4) -> None:
    assert len(trace(expected)) == 6
    assert trace(folder) == pytest.approx(trace(expected), rel=loss)
    ours, theirs = load_file(folder / file), load_file(expected / file)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=weights, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow  # FSDP2 is launched the same way, and DDP without accelerate's launcher in test_scale_out
def test_two_processes_with_ddp_are_one(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(flags("one", 1, True, False)) == 0
    said = launch("ddp.yaml", "-m", "bnf_train", *flags("two", 2, True, False))
    same_run(tmp_path / "two", tmp_path / "one")
    assert "find_unused_parameters" not in said


def test_stopped_and_resumed_two_processes_end_with_the_same_weights(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Bitwise. One of the two is told to stop, in the middle of the third step; random numbers are drawn (dropout)."""
    more = ("--save_strategy", "steps", "--save_steps", "100", "--per_device_train_batch_size", "1")
    undisturbed, stopped = (flags(name, 2, False, False, *more) for name in ("undisturbed", "stopped"))
    config = tmp_path / "untied" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.001}))
    resumed = [*stopped, "--resume_from_checkpoint", "auto"]
    # in the same launch, which takes longer than the runs: 5 rows, so that a process has a micro-batch without any
    five = tmp_path / "five.jsonl"
    five.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:5]))
    whole = ("--dataset", str(five), "--batch_size", "8", "--num_train_epochs", "6", "--per_device_train_batch_size")
    uneven = {"flags": flags("uneven", 2, True, False, *whole, "1")}
    stops = {"flags": stopped, "stop": [1, 5]}
    launch_runs("ddp.yaml", tmp_path, {"flags": undisturbed}, stops, {"flags": resumed}, uneven)
    assert main(flags("even", 1, True, False, *whole, "8")) == 0
    same_run(tmp_path / "uneven", tmp_path / "even")
    assert [c.name for c in checkpoints(tmp_path / "stopped")] == ["checkpoint-2", "checkpoint-6"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "undisturbed"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_two_processes_with_fsdp2_are_one(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Tied and untied, float32 and bf16 autocast, all weights or an adapter; what is saved is a whole ordinary folder."""
    launch_and_compare("fsdp2.yaml", flags, tmp_path, RUNS)


@pytest.mark.slow  # two launchers and two processes on two cores
def test_two_machines_with_fsdp2_are_one_process(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Two launchers that find each other by an address, as on two machines."""
    launch_and_compare("multi_node.yaml", flags, tmp_path, RUNS[:1], machines=2)


@pytest.mark.slow  # two launchers and two processes on two cores, twice
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp2.yaml"])
def test_two_torchrun_agents_are_one_process(configuration: str, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """`torchrun --nnodes 2` on each of two machines; FSDP2 by the variables that accelerate's launcher would set."""
    (tmp_path / "runs.jsonl").write_text(json.dumps({"flags": flags("two", 2, False, False)}))
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    script = [str(Path(__file__).with_name("runs_on_cpu.py")), str(tmp_path / "runs.jsonl")]
    told = environment(0, 2, fsdp=configuration == "fsdp2.yaml")
    agents = [[*agent, "--master_port", told["MASTER_PORT"], "--node_rank", str(rank), *script] for rank in range(2)]
    fsdp = {name: value for name, value in told.items() if "FSDP" in name}
    children.together(agents, CUDA_VISIBLE_DEVICES="", **fsdp)
    assert main(flags("one", 1, False, False)) == 0
    same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow  # DeepSpeed's import alone takes half a minute of two cores
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_with_zero3_are_one(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    launch_and_compare("deepspeed_zero3.yaml", flags, tmp_path, RUNS[:1])


WITH_LORA = ("--use_peft", "true", "--lora_r", "4")
LABELLED = [row | {"label": True} for row in SINGLES[:7]]
ZERO3: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "float32": (PAIRS[:7], ()),
    "bf16": (PAIRS[:7], ("--bf16", "true")),
    "lora": (PAIRS[:7], WITH_LORA),
    "lora-bf16": (PAIRS[:7], (*WITH_LORA, "--bf16", "true")),
    "preferred": (LABELLED, ()),
    "preferred-lora-bf16": (LABELLED, (*WITH_LORA, "--bf16", "true")),
}


@pytest.mark.slow  # DeepSpeed's import alone takes half a minute of two cores
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("case", ZERO3)
def test_zero3_has_every_metric_of_one_process(
    case: str, flags: Callable[..., list[str]], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Uneven: 7 rows by 4 are 2 steps an epoch, in the second of which a process has a micro-batch without any."""
    rows, more = ZERO3[case]
    more += ("--dataset", str(write_rows(rows, "case.jsonl")), "--eval_dataset", str(write_rows(PAIRS[5:], "held_out.jsonl")))
    more += ("--eval_strategy", "steps", "--eval_steps", "3", "--per_device_eval_batch_size", "2")
    more += ("--per_device_train_batch_size", "1")
    launch_runs("deepspeed_zero3.yaml", tmp_path, {"flags": flags("two", 2, False, False, *more)})
    assert main(flags("one", 1, False, False, *more)) == 0
    # in bf16 the same products in another order differ by its spacing
    assert_same_run(tmp_path / "two", tmp_path / "one", *((5e-2, 3e-2) if "bf16" in case else ()))


def launch_and_compare(
    configuration: str, flags: Callable[..., list[str]], folder: Path, runs: list[tuple[Any, ...]], machines: int = 1
) -> None:
    name = {run: "-".join(map(str, run)) for run in runs}
    launch_runs(configuration, folder, *({"flags": flags(f"two-{name[run]}", 2, *run)} for run in runs), machines=machines)
    for run in runs:
        assert main(flags(f"one-{name[run]}", 1, *run)) == 0
        one, two = folder / f"one-{name[run]}", folder / f"two-{name[run]}"
        if run[2:]:
            same_run(two, one, "adapter_model.safetensors")
        else:
            # in bf16 the same products in another order differ by its spacing
            same_run(two, one, **({"loss": 2e-2, "weights": 3e-2} if run[1] else {}))
            assert AutoModelForCausalLM.from_pretrained(two).dtype == torch.float32


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_is_what_accelerate_reads(path: Path) -> None:
    text = path.read_text()
    assert f"accelerate launch --config_file {path.name}" in text.split("compute_environment")[0]  # its launch line
    config = ClusterConfig.from_yaml_file(yaml_file=path)  # refuses keys that it does not know, but not the nested ones
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= options.keys()
    assert config.mixed_precision == "no"  # the flag --bf16 decides
    if path.name in ("fsdp2.yaml", "multi_node.yaml"):
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 0.99, 1.0), (torch.bfloat16, 0.0, 0.02)], ids=["float32", "bfloat16"]
)
def test_updates_lost_to_rounding_are_noticed(
    dtype: torch.dtype, low: float, high: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AdamW at the paper's 5e-7, weights of a usual size; rows of an embedding without a gradient do not count."""
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 300)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=5e-7, use_cpu=True, report_to=[])
    callback, logged = WeightsMoved(), []
    shared: dict[str, Any] = {"args": args, "state": None, "control": None, "model": model, "optimizer": optimizer}
    with caplog.at_level(logging.WARNING):
        for learning_rate in (0.0, 1e-8, 5e-7, 5e-7):  # warm-up begins where nothing can move
            optimizer.param_groups[0]["lr"] = learning_rate
            callback.on_step_begin(**shared)
            (10 * model(torch.arange(500, 600))).pow(2).sum().backward()
            callback.on_pre_optimizer_step(**shared)
            optimizer.step()
            optimizer.zero_grad()
            callback.on_step_end(**shared)
            logged.append(callback.take())
    before, low_rate, log, after = logged
    assert before == low_rate == after == {}  # measured once
    assert low <= log["bnf/weights_moved"] <= high
    assert ("lost to rounding" in caplog.text) == (dtype == torch.bfloat16)


@pytest.mark.child
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_bf16_weights_move_by_stochastic_rounding(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """As far as float32 weights do, on average, though each step is a tenth of a bf16 weight's spacing or less."""
    file = Path(flags("", 1, False, False)[1]) / "model.safetensors"
    before = {name: value.bfloat16().float() for name, value in load_file(file).items()}
    save_file(before, file, metadata={"format": "pt"})

    def moved(output: str, *more: str) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for each shape of a weight
            assert main(flags(output, 1, False, False, *more)) == 0
        after = load_file(tmp_path / output / "model.safetensors")
        return torch.cat([(after[name].float() - value).flatten() for name, value in before.items()])

    more = ("--learning_rate", "5e-5", "--lr_scheduler_type", "constant")
    single = moved("float32", *more)
    half = moved("bfloat16", *more, "--dtype", "bfloat16", "--optim", "adamw_torch_8bit")
    assert single @ half / (single @ single) == pytest.approx(1, abs=0.2)
