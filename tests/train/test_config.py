"""Flags, presets and defaults: which wins, and what is refused."""

import dataclasses
import re
from pathlib import Path

import children
import pytest
import torch
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from bnf_core import OBJECTIVES
from bnf_train import options
from bnf_train.__main__ import main
from bnf_train.config import FOR_BF16_WEIGHTS, PRESETS, BNFConfig
from bnf_train.errors import UsageError
from bnf_train.flags import parse

DATA = ["--model", "some/model", "--dataset", "x.jsonl", "--output_dir", "unused"]


@pytest.mark.parametrize(
    ("model", "dataset", "rate"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback", 5e-7),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm", 6e-7),
        ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm", 8e-7),
    ],
)
def test_presets_are_the_papers(model: str, dataset: str, rate: float) -> None:
    config = parse(["--model", model])
    assert (config.dataset, config.learning_rate, config.batch_size, config.max_length) == (dataset, rate, 128, 4096)
    assert (config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs) == ("cosine", 0.1, 1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size == 128
    assert config.optim.startswith("adamw")


def test_no_argument_is_the_embedded_demo() -> None:
    config = parse([])
    assert "demo" in config.model
    assert str(config.dataset).endswith("preferences.jsonl")


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default() -> None:
    model = "google/gemma-2-9b-it"
    config = parse(["--model", model, "--learning-rate", "1e-6", "--dataset=y.jsonl"])
    assert (config.learning_rate, config.dataset) == (1e-6, "y.jsonl")
    assert PRESETS[model]["learning_rate"] == 8e-7


def test_every_flag_of_training_arguments_works() -> None:
    config = parse([*DATA, "--max_steps", "7", "--weight-decay", "0.1", "--optim", "adafactor", "--seed", "3"])
    assert (config.max_steps, config.weight_decay, config.optim, config.seed) == (7, 0.1, "adafactor", 3)


def test_cpu_needs_no_flag() -> None:
    config = parse(DATA)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert config.device.type == "cpu"
    assert parse([*DATA, "--bf16", "true"]).bf16
    assert not parse([*DATA, "--bf16", "false"]).bf16


@pytest.mark.parametrize(
    ("flags", "per_step", "accumulate"),
    [
        ([], 128, 128),
        (["--batch_size", "32", "--per_device_train_batch_size", "4"], 32, 8),
        (["--per_device_train_batch_size", "3"], 126, 42),
        (["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"], 8, 2),
    ],
)
def test_batch_size_counts_rows_of_the_whole_step(flags: list[str], per_step: int, accumulate: int) -> None:
    config = parse([*DATA, *flags])
    assert (config.batch_size, config.gradient_accumulation_steps) == (per_step, accumulate)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "some/model"], "--dataset is missing"),
        ([*DATA, "--max_length", "1"], "--max_length: expected at least 2"),
        ([*DATA, "--eval_size", "-1"], "--eval_size"),
        ([*DATA, "--batch_size", "10", "--per_device_train_batch_size", "4"], "--batch_size 10: expected a multiple of the 4"),
        ([*DATA, "--batch_size", "8", "--gradient_accumulation_steps", "3"], "leave one out"),
        ([*DATA, "--fp16", "--bf16"], "At most one of fp16 and bf16"),
        ([*DATA, "--per_device_train_batch_size", "0"], "--per_device_train_batch_size: expected at least 1, got 0"),
        ([*DATA, "--gradient_accumulation_steps", "-2"], "--gradient_accumulation_steps: expected at least 1, got -2"),
        ([*DATA, "--learning_rate", "-1"], "--learning_rate: expected a number that is not negative"),
        ([*DATA, "--learning_rate", "nan"], "--learning_rate: expected a number, got nan"),
    ],
)
def test_contradictions_are_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)


@pytest.mark.parametrize("flags", [["--objective", "dop"], ["--no_such_flag", "1"], ["--max_length", "long"]])
def test_unknown_flags_and_values_are_named(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0]):
        parse([*DATA, *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"--learning_rat: no such flag; the nearest is --learning_rate "),
        (["--max-lenght=3"], r"--max_lenght: no such flag; the nearest is --max_length "),
        (["--zzzzzz"], r"--zzzzzz: no such flag \("),
        (["pairs.jsonl"], r"pairs.jsonl: expected a flag, which begins with --"),
        (["--max_length"], "--max_length: expected one argument"),
        (["--max_length", "1.5"], "--max_length: expected int, got '1.5'"),
        (["--lr-scheduler-type", "cosin"], "--lr_scheduler_type: invalid choice: 'cosin' .*; the nearest is cosine "),
        (["--optim", "adamw_torch_fuse"], "--optim: .*; the nearest is adamw_torch_fused "),
        (["--packing", "perhaps"], "--packing: "),
    ],
)
def test_what_was_meant_is_suggested(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse([*DATA, *flags])
    assert "\n" not in str(caught.value)


def test_dashes_and_underscores_are_the_same() -> None:
    one = parse([*DATA, "--per-device-train-batch-size", "2", "--eval-size=3", "--no-packing", "--max_length", "77"])
    other = parse([*DATA, "--per_device-train_batch-size=2", "--eval_size", "3", "--no_packing", "--max-length=77"])
    assert one.per_device_train_batch_size == other.per_device_train_batch_size == 2
    assert (one.eval_size, one.packing, one.max_length) == (other.eval_size, other.packing, other.max_length) == (3, False, 77)
    assert parse([*DATA, "--run-name", "a-b"]).run_name == "a-b"  # a value keeps its dashes


def in_file(folder: Path, text: str) -> list[str]:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(folder / "run.yaml")]


def test_a_file_has_the_same_keys_as_the_flags(tmp_path: Path) -> None:
    text = """
        model: some/model
        dataset: x.jsonl
        output-dir: unused
        objective: simpo
        gamma: 1.5
        learning_rate: 1e-6       # YAML reads this as text
        max_length: 77
        packing: false
        gradient_checkpointing: true
        save_strategy: no         # and this as false
        eval_steps:               # and this as nothing
        eval_size: 0
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1.0e-8}
        lora_target_modules: [q_proj, v_proj]
        use_peft: true
        logging_nan_inf_filter: yes
    """
    config = parse(in_file(tmp_path, text))
    flags = ["--objective", "simpo", "--gamma", "1.5", "--learning_rate", "1e-6", "--max_length", "77", "--packing", "false"]
    flags += ["--gradient_checkpointing", "--save_strategy", "no", "--eval_size", "0"]
    flags += ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-8}']
    flags += ["--lora_target_modules", "q_proj", "v_proj", "--use_peft"]
    assert config.to_dict() == parse([*DATA, *flags]).to_dict()
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-8}


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    text = "model: google/gemma-2-9b-it\nlearning_rate: 1.0e-6\nmax_length: 2048\nobjective: dpo\nbeta: 0.3\n"
    config = parse([*in_file(tmp_path, text), "--max_length", "1024", "--output_dir", "unused"])
    assert config.dataset == PRESETS["google/gemma-2-9b-it"]["dataset"]
    assert (config.learning_rate, config.max_length, config.num_train_epochs) == (1e-6, 1024, 1)
    assert (config.objective, config.hyperparameters) == ("dpo", {"beta": 0.3})
    file = in_file(tmp_path, text + "gradient_accumulation_steps: 4\n")
    config = parse([*file, "--batch-size", "32", "--output_dir", "unused"])
    assert (config.batch_size, config.gradient_accumulation_steps) == (32, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "run.yaml: unknown key learning_rat; the nearest is learning_rate "),
        ("max_length: 5\n? [1, 2]\n: 3", "run.yaml, line 2: expected YAML, got found unhashable key"),
        ("max_length: long", "run.yaml: --max_length: expected int, got 'long'"),
        ("max_length: [1, 2]", "run.yaml: --max_length: expected int"),
        ("objective: dop", "--objective dop: expected one of"),
        ("objective: dpo\ngamma: 1", "--gamma: --objective dpo has no such hyper-parameter"),
        ("config: other.yaml", "run.yaml: unknown key config"),
        ("a: 1\n  b: [", "run.yaml, line 2: expected YAML, got "),
        ("- max_length", "run.yaml: expected keys and values, such as `objective: bnf`, got list"),
        ("", "run.yaml: expected keys and values"),
        ("x: !!python/object/apply:os.system [echo]", "run.yaml, line 1: expected YAML, got could not determine a constructor"),
        ("max_length: 5\nmax-length: 6", "run.yaml, line 2: the key max_length stands there a second time"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse([*in_file(tmp_path, text), *DATA])
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*none.yaml: no such file"):
        parse([*DATA, "--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match=r"--config .*: is a directory"):
        parse([*DATA, "--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\xff")
    with pytest.raises(UsageError, match=r"latin\.yaml: expected YAML"):
        parse([*DATA, "--config", str(tmp_path / "latin.yaml")])


def test_help_is_the_flags_that_most_runs_need() -> None:
    """At once, because neither torch nor transformers is imported, and on one screen or two, whatever the terminal's width."""
    code = (
        "import sys; from bnf_train.__main__ import main; code = main(['--help'])\n"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    for columns in (80, 120):
        printed, imported = children.run("-c", code, COLUMNS=str(columns))
        assert imported == "set()\n"
        lines = printed.splitlines()
        assert len(lines) < 70
        assert max(map(len, lines)) < columns
        shown = set(re.findall(r"--(\w+)", printed)) - {"flag"}
        own = {field.name for group in options.GROUPS for field in dataclasses.fields(group)}
        assert shown - own == {name for flags in options.THEIRS.values() for name in flags} | {"config", "debug", "help_all"}
        assert own - shown == options.RARE


def test_help_shows_transformers_defaults_as_they_are() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, (value, _) in (row for flags in options.THEIRS.values() for row in flags.items()):
        assert name in theirs
        assert value.isupper() or value == ("" if theirs[name] in (None, False) else str(theirs[name]))


def test_no_flag_of_transformers_is_taken() -> None:
    """Those that this config declares anew read the same values, with another default or a help of their own."""
    ours = {field.name: field for field in dataclasses.fields(BNFConfig)}
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    assert {name for name in theirs if ours[name] is not theirs[name]} == {
        *("output_dir", "bf16", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "logging_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "remove_unused_columns"),
    }


def test_one_process_drives_one_device_and_compiles_layers_itself() -> None:
    config = parse([*DATA, "--per_device_train_batch_size", "4", "--torch_compile_backend", "eager"])
    config._n_gpu = 8  # what a machine with 8 GPUs says without a launcher
    assert (config.n_gpu, config.train_batch_size) == (1, 4)
    assert config.torch_compile
    assert config.torch_compile_backend == config.to_dict()["torch_compile_backend"] == "eager"


def test_help_all_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help-all"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--config", "--beta", "--lambda", "--objective", "--dtype", *BNFConfig.__dataclass_fields__):
        name = flag.removeprefix("--")
        digests = ("rows_digest", "reference_digest", "model_digest")
        assert f"  --{name}" in printed or name in ("hyperparameters", "datasets", "tracebacks", *digests)
    for objective in OBJECTIVES:
        assert objective in printed
    assert "--debug without a value" in printed
    assert "SUPPRESS" not in printed


def test_debug_without_a_value_is_ours_and_with_one_transformers(tmp_path: Path) -> None:
    assert not parse(DATA).tracebacks
    assert parse([*DATA, "--debug"]).tracebacks
    assert parse(["--debug", *DATA]).tracebacks
    assert parse([*DATA, *in_file(tmp_path, "debug: true")]).tracebacks
    assert not parse([*DATA, *in_file(tmp_path, "debug: false")]).tracebacks
    for flags in (
        ["--debug", "underflow_overflow"],
        ["--debug=underflow_overflow"],
        in_file(tmp_path, "debug: underflow_overflow"),
    ):
        config = parse([*DATA, *flags])
        assert not config.tracebacks
        assert config.debug == [DebugOption.UNDERFLOW_OVERFLOW]
    both = parse([*DATA, "--debug", "--debug", "underflow_overflow"])
    assert both.tracebacks
    assert both.debug == [DebugOption.UNDERFLOW_OVERFLOW]


# --- what weights are held in ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_bf16_weights_are_refused_where_updates_are_lost_to_rounding(optim: str) -> None:
    with pytest.raises(UsageError, match="smaller than the spacing of bf16 numbers; use --optim adamw_torch_8bit"):
        parse([*DATA, "--dtype", "bfloat16", "--optim", optim])
    assert parse([*DATA, "--optim", optim]).dtype == "float32"


@pytest.mark.parametrize("optim", FOR_BF16_WEIGHTS)
def test_bf16_weights_need_an_optimizer_that_makes_up_for_rounding(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switch, package = FOR_BF16_WEIGHTS[optim]
    flags = [*DATA, "--dtype", "bfloat16", "--optim", optim]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"needs the package {package}, which is not installed"):
        parse(flags)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == package)
    config = parse(flags)
    assert (config.dtype, config.optim_args) == ("bfloat16", f"{switch}=True")
    assert parse([*flags, "--optim_args", "block_size=64"]).optim_args == f"block_size=64,{switch}=True"
    with pytest.raises(UsageError, match=f"needs {switch}=True in --optim_args"):
        parse([*flags, "--optim_args", f"{switch}=False"])
