"""Every flag, transformers' and the project's own, is in exactly one list: it moves the weights, leaves them bitwise the same,
is shown by another test, has nothing to do here, or is refused by name before anything is read."""

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE
from preference_rows import PAIRS
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_available

from bnf_train import report
from bnf_train.__main__ import main
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.inherited import ACCELERATOR, REFUSED
from bnf_train.training import checkpoint
from bnf_train.training.tryout import try_out

Weights = dict[str, torch.Tensor]

# 12 pairs, 2 held out, 4 steps of 2 rows at a constant learning rate
BASE = {
    "batch_size": "2",
    "per_device_train_batch_size": "2",
    "max_steps": "4",
    "learning_rate": "0.01",
    "lr_scheduler_type": "constant",
    "warmup_steps": "0",
    "eval_size": "2",
    "max_length": "100",
    "bf16": "false",
    "save_strategy": "no",
    "show_examples": "0",
    "disable_tqdm": "true",
    "no_reference_cache": "true",
    "report_to": "none",
}
DROP = {"dataloader_drop_last": "true"}
# a run with these has other weights
MOVES: dict[str, dict[str, str]] = {
    "learning_rate": {"learning_rate": "0.02"},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 0.005}'},
    "warmup_steps": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": "3"},
    "optim": {"optim": "adagrad"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": "0.5"},
    "adam_beta1": {"adam_beta1": "0.5"},
    "adam_beta2": {"adam_beta2": "0.5"},
    "adam_epsilon": {"adam_epsilon": "0.1"},
    "max_grad_norm": {"optim": "sgd", "max_grad_norm": "0.001"},
    "num_train_epochs": {"max_steps": "-1", "num_train_epochs": "2"},
    "max_steps": {"max_steps": "3"},
    "batch_size": {"batch_size": "4"},
    "seed": {"seed": "7"},
    "data_seed": {"data_seed": "7"},
    "bf16": {"bf16": "true"},
    "fp16": {"fp16": "true"},
    "max_length": {"max_length": "44"},
    "dataloader_drop_last": {
        "max_steps": "-1",
        "batch_size": "3",
        "per_device_train_batch_size": "3",
        "dataloader_drop_last": "",
    },
    "load_best_model_at_end": {
        **{"eval_strategy": "steps", "eval_steps": "1", "save_strategy": "steps", "save_steps": "1"},
        **{"metric_for_best_model": "tokens/preferred", "load_best_model_at_end": "true"},  # the first of equals
    },
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "share_prompts": {"share_prompts": "false"},  # rows with one prompt are not kept together
    "packing": {"packing": "false"},  # by rounding, as those below
    "tokens_per_pass": {"tokens_per_pass": "60"},
    "per_device_train_batch_size": {"per_device_train_batch_size": "1"},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": "1"},  # of the reference's pass, too
    "gradient_accumulation_steps": {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "2"},
}
BY_ROUNDING = (
    "per_device_eval_batch_size",
    "packing",
    "tokens_per_pass",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
# one run with all of these has the same weights, bitwise
SAME = {
    "activation_checkpointing": "true",
    "activation_checkpointing_kwargs": '{"use_reentrant": true}',
    "torch_empty_cache_steps": "1",
    "logging_strategy": "steps",
    "logging_steps": "2",
    "logging_first_step": "true",
    "logging_nan_inf_filter": "false",
    "log_on_each_node": "false",
    "log_level": "error",
    "log_level_replica": "error",
    "include_num_input_tokens_seen": "true",
    "disable_tqdm": "false",
    "run_name": "name",
    "eval_strategy": "steps",
    "eval_steps": "2",
    "eval_delay": "2",
    "eval_on_start": "true",
    "eval_accumulation_steps": "1",
    "save_strategy": "steps",
    "save_steps": "2",
    "save_total_limit": "2",
    "save_only_model": "true",
    "save_on_each_node": "true",
    "metric_for_best_model": "rewards/accuracies",
    "greater_is_better": "true",
    "full_determinism": "true",
    "use_cpu": "true",
    "skip_memory_metrics": "false",
    "debug": "underflow_overflow",
    "dataloader_num_workers": "2",
    "dataloader_persistent_workers": "true",
    "dataloader_prefetch_factor": "3",
    "dataloader_pin_memory": "false",
    "dataloader_in_order": "true",
    "dataloader_multiprocessing_context": "fork",
    "ddp_find_unused_parameters": "false",
    "ddp_bucket_cap_mb": "5",
    "ddp_broadcast_buffers": "false",
    "ddp_static_graph": "true",
    "ddp_timeout": "60",
    "accelerator_config": '{"non_blocking": true}',
    "show_examples": "1",
}
# shown by the tests of another file
ELSEWHERE = {
    "test_trainer.py": ("torch_compile", "torch_compile_backend", "train_on"),
    "test_resume.py": ("resume_from_checkpoint", "output_dir"),
    "test_distributed.py": ("deepspeed",),
    "test_data.py": ("score_center", "pairing_ratio", "too_long", "duplicates", "streaming"),
    "test_counting.py": ("malformed", "no_boundary", "several_turns"),
    "test_templates.py": (
        *("chat_template", "chat_template_kwargs", "template_refuses", "not_rendered", "already_rendered"),
        *("empty",),
    ),
    "test_reference_cache.py": ("ref_model", "reference_cache"),
    "test_errors.py": ("trust_remote_code", "gradient_checkpointing"),
    "test_config.py": ("dtype", "dataset", "model", "hyperparameters", "datasets", "tracebacks"),
    "test_objective_flags.py": ("objective",),
    "test_checks.py": (
        *("check", "check_dataset", "check_rows", "check_samples", "check_temperature", "check_max_new_tokens", "check_steps"),
    ),
    "test_lora.py": ("use_peft", "lora_r", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "load_in_4bit"),
    "test_inherited_flags.py": (
        *(
            "lora_alpha",
            "lora_kwargs",
            "eval_dataset",
            "template_date",
            "optim_target_modules",
            "push_to_hub",
            "gradient_checkpointing_kwargs",
        ),
        *("torch_compile_mode", "rows_digest", "reference_digest", "model_digest", "tf32"),
    ),
}
SHOWN_ELSEWHERE = {name for names in ELSEWHERE.values() for name in names}
# has something to do only beside another flag or on other machines, where transformers does it
HARMLESS = {
    "with --push_to_hub": ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    "with --report_to trackio": ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    "with a launcher": ("ddp_backend", "fsdp", "fsdp_config", "parallelism_config"),
    "with callbacks of one's own": ("restore_callback_states_from_checkpoint",),
}


def test_every_flag_is_in_exactly_one_list() -> None:
    shared = {"train_sampling_strategy"}  # some of its values move the weights, others are refused
    lists = [MOVES, SAME.keys() - BASE.keys() - MOVES.keys(), BASE.keys() - MOVES.keys() - SHOWN_ELSEWHERE]
    lists += [SHOWN_ELSEWHERE, *HARMLESS.values(), REFUSED.keys() - shared]
    assert sorted(name for names in lists for name in names) == sorted(field.name for field in dataclasses.fields(BNFConfig))


@pytest.mark.parametrize(("file", "names"), ELSEWHERE.items(), ids=list(ELSEWHERE))
def test_what_is_shown_elsewhere_is_there(file: str, names: tuple[str, ...]) -> None:
    text = (Path(__file__).parent / file).read_text()
    assert not [name for name in names if f"--{name}" not in text and f'"{name}' not in text and f"{name}=" not in text]


Run = Callable[..., Weights]


@pytest.fixture
def run(model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(report, "write", lambda *_: None)
    rows = str(write_rows(PAIRS[:1] * 3 + PAIRS[1:] * 3))

    def run(**flags: str) -> Weights:
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        given = BASE | {"model": str(model_folder), "dataset": rows, "output_dir": str(output)} | flags
        assert main([part for name, value in given.items() for part in (f"--{name}", value) if part]) == 0
        return load_file(output / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def _base() -> list[Weights]:
    return []


@pytest.fixture
def base(run: Run, _base: list[Weights]) -> Weights:
    """Of the run without further flags, once."""
    if not _base:
        _base.append(run())
    return _base[0]


def largest_difference(one: Weights, other: Weights) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", MOVES)
def test_a_flag_moves_the_weights(name: str, base: Weights, run: Run) -> None:
    moved = largest_difference(run(**MOVES[name]), base)
    assert 0 < moved < 1e-4 if name in BY_ROUNDING else moved > 1e-5


def test_held_out_rows_of_their_own(base: Weights, run: Run, tmp_path: Path) -> None:
    """None are kept back from the training rows then."""
    assert largest_difference(run(eval_dataset=str(tmp_path / "rows.jsonl")), base) > 1e-5


def test_the_day_that_a_template_writes(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %m') }} " + CHAT_TEMPLATE)
    first, same, other = (run(chat_template=str(template), template_date=f"2026-01-0{day}") for day in (1, 1, 2))
    assert largest_difference(first, same) == 0 < largest_difference(first, other)


@pytest.mark.child  # data workers are forked
def test_flags_that_leave_the_weights_as_they_are(base: Weights, run: Run, tmp_path: Path) -> None:
    same = run(**SAME)
    assert largest_difference(same, base) == 0
    kept = checkpoint.checkpoints(tmp_path / "out")[-1]
    state = json.loads((kept / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 4]
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry][-2:] == [2, 4]
    assert state["num_input_tokens_seen"] > 0
    assert state["best_metric"] is not None
    assert not (kept / "optimizer.safetensors").exists()


# --- refused by name, before anything is read ---------------------------------------------------------------------------

OTHER: dict[str, Any] = {  # a value of each refused flag
    "label_smoothing_factor": 0.1,
    "label_names": "labels",
    "length_column_name": "size",
    "neftune_noise_alpha": 5,
    "train_sampling_strategy": "group_by_length",
    "include_for_metrics": "inputs",
    "local_rank": 1,
    "liger_kernel_config": '{"rope": true}',
    **dict.fromkeys(("do_train", "average_tokens_across_devices", "eval_do_concat_batches"), "false"),
}
NOWHERE = ["--model", "/no/such/model", "--dataset", "/no/such/rows.jsonl", "--output_dir", "unused"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_is_named_with_the_reason(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NOWHERE, f"--{name}", str(OTHER.get(name, "true"))]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: --{name}\b", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_at_its_default_is_none(name: str) -> None:
    default = BNFConfig.__dataclass_fields__[name].default
    if isinstance(default, (bool, int, float, str)) and name != "do_train":
        parse([*NOWHERE, f"--{name}", str(default)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_grad_norm -1", "--max_grad_norm: expected a limit, or 0 for none, got -1"),
        ("--weight_decay -1", "--weight_decay: expected a number that is not negative"),
        ("--num_train_epochs 0", "--num_train_epochs: expected more than 0"),
        ("--max_steps 0", "--max_steps: expected at least 1, or -1"),
        ("--seed -1", "--seed: expected a number from 0"),
        ("--data_seed -1", "--data_seed: expected a number from 0"),
        ("--save_steps 0", "--save_steps: expected a number of steps"),
        ("--eval_strategy steps --eval_steps 0", "--eval_steps: expected a number of steps"),
        ("--eval_delay -1", "--eval_delay: expected"),
        ("--save_total_limit 0", "--save_total_limit: expected at least 1"),
        ("--eval_accumulation_steps 0", "--eval_accumulation_steps: expected at least 1"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers: expected a number of processes"),
        ("--ddp_timeout -1", "--ddp_timeout: expected a number of seconds"),
        ("--dataloader_persistent_workers", "--dataloader_persistent_workers: needs --dataloader_num_workers"),
        ("--dataloader_multiprocessing_context spawn", "--dataloader_multiprocessing_context: needs --dataloader_num_workers"),
        ("--dataloader_prefetch_factor 3", "--dataloader_prefetch_factor can only be set when"),
        ('--fsdp_config {"min_num_params":1}', "--fsdp_config: needs --fsdp"),
        ("--fsdp full_shard", "--fsdp: there is one process"),
        ("--save_strategy best", "--save_strategy best: needs --metric_for_best_model"),
        ("--save_strategy best --metric_for_best_model loss", "--save_strategy best: needs --metric_for_best_model and --eval"),
        pytest.param(
            '--deepspeed {"zero_optimization":{"stage":3}}',
            "--deepspeed: needs the package deepspeed",
            marks=pytest.mark.skipif(is_deepspeed_available(), reason="it is installed"),
        ),
    ],
)
def test_values_that_cannot_be_are_one_sentence(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse([*NOWHERE, *flags.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "possible"), ACCELERATOR.items())
def test_values_of_accelerator_config(key: str, possible: tuple[Any, ...]) -> None:
    parse([*NOWHERE, "--accelerator_config", json.dumps({key: possible[0]})])
    other: Any = {"num_steps": 2} if key == "gradient_accumulation_kwargs" else not possible[0]
    with pytest.raises(UsageError, match=f"--accelerator_config: {key} "):
        parse([*NOWHERE, "--accelerator_config", json.dumps({key: other})])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim adamw_bnb_8bit", "--optim adamw_bnb_8bit: .*bitsandbytes"),
        ("--optim galore_adamw --optim_target_modules all-linear", "--optim galore_adamw: .*galore_torch"),
        ("--optim lomo", "--optim lomo: .*lomo"),
        ("--optim schedule_free_adamw", "--optim schedule_free_adamw: .*schedulefree"),
        ("--optim sgd --optim_args nonsense=3", "--optim sgd --optim_args nonsense=3: nonsense=3 has no effect"),
        ("--optim sgd --optim_args momentum=0.9,nonsense=3", "nonsense=3 has no effect"),
        ("--optim_args fused=True", "fused=True has no effect"),
        ("--optim_args nonsense", "--optim_args nonsense: "),
        ("--optim sgd --optim_args momentum=much", "--optim_args momentum=much: "),
        ("--optim_target_modules q_proj", "--optim_target_modules is for GaLore's"),
        ("--adam_beta1 1.5", "Invalid beta"),
        ("--adam_epsilon -1", "Invalid epsilon"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: .*min_lr"),
        ("--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay: .*num_decay_steps"),
        ('--lr_scheduler_kwargs {"min_lr":1}', "--lr_scheduler_kwargs .*unexpected keyword argument 'min_lr'"),
        ("--report_to nonsense", "--report_to nonsense: .*not supported"),
        ("--report_to wandb", "--report_to wandb: .*wandb"),
        ("--torch_compile_backend nonsense", "--torch_compile_backend nonsense: Invalid backend"),
        ("--torch_compile_mode nonsense", "--torch_compile_mode nonsense: Unrecognized mode"),
        (
            '--gradient_checkpointing --gradient_checkpointing_kwargs {"nonsense":1}',
            "_kwargs .*nonsense",
        ),
        ("--push_to_hub", "--push_to_hub: the Hugging Face hub cannot be reached"),
        ("--metric_for_best_model accuracy", "--metric_for_best_model accuracy: no metric of an evaluation"),
        ("--load_best_model_at_end", "--load_best_model_at_end requires the save and eval strategy to match"),
        ("--use_peft --lora_kwargs [1]", r"--lora_kwargs \[1\]: expected a JSON object"),
        (
            '--use_peft --lora_kwargs {"use_dor":true}',
            "--lora_kwargs: peft's .* no use_dor; the nearest is use_dora",
        ),
        ('--use_peft --lora_kwargs {"r":3}', "--lora_kwargs: r is --lora_r"),
        ('--use_peft --lora_kwargs {"init_lora_weights":"pissa"}', "init_lora_weights pissa: the adapter would not begin"),
        ("--lora_alpha 3", "--lora_alpha: has no effect without --use_peft"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_read(flags: str, message: str) -> None:
    if importlib.util.find_spec(message.rpartition("*")[2].strip("'.") or "-"):
        pytest.skip("that package is installed")
    with pytest.raises(UsageError, match=message) as caught:
        try_out(parse([*NOWHERE, *flags.split()]))
    assert "\n" not in str(caught.value)


def test_trying_draws_no_random_number_and_takes_what_is_there() -> None:
    before = torch.random.get_rng_state()
    for flags in ("", "--optim adafactor", "--optim sgd --optim_args momentum=0.9", "--lr_scheduler_type polynomial"):
        try_out(parse([*NOWHERE, *flags.split()]))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- resuming -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_or_refused(
    run: Run, base: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every flag that moves the weights, but for what only rounds or is longer, is named with both values."""
    run(save_strategy="steps", save_steps="2")
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", kept / "checkpoint-2")
    then = checkpoint.arguments_of(kept / "checkpoint-2")
    for name, flags in MOVES.items():
        config = parse([*NOWHERE, *(part for pair in (BASE | flags).items() for part in (f"--{pair[0]}", pair[1]) if part)])
        now = then | {n: v for n, v in json.loads(config.to_json_string()).items() if n in flags}
        said: list[str] = []
        if name in (*BY_ROUNDING, "num_train_epochs", "max_steps", "load_best_model_at_end"):
            checkpoint.check_same_run(kept / "checkpoint-2", now, said.append)
            assert bool(said) == (name in ("num_train_epochs", "max_steps")), name
        else:
            with pytest.raises(UsageError, match=rf"--(?:{'|'.join(flags)}) .+ was .+ when it was written"):
                checkpoint.check_same_run(kept / "checkpoint-2", now, said.append)


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_resumed_run_has_the_weights_that_it_began_with(
    which: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    """By what is in them: another folder with the same weights is the same."""
    shutil.copytree(model_folder, tmp_path / "moved")
    first = run(save_strategy="steps", save_steps="2")
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "kept" / "checkpoint-2")
    again = {"resume_from_checkpoint": str(tmp_path / "kept" / "checkpoint-2"), "save_strategy": "no"}
    assert largest_difference(run(**again, **{which: str(tmp_path / "moved")}), first) == 0
    capsys.readouterr()
    with pytest.raises(AssertionError):
        run(**again, **{which: str(tmp_path / "kept" / "checkpoint-2")})
    said = capsys.readouterr().err
    assert "weights" in said
    assert "are others than when it was written, so this would be another run" in said


# --- peft's own options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"layers_to_transform": [0]}]
)
def test_options_of_peft(kwargs: dict[str, Any], run: Run, tmp_path: Path) -> None:
    targets = "q_proj" if "layers_to_transform" in kwargs else r".*self_attn\.(q|v)_proj"  # peft's does not go with a pattern
    flags = {"use_peft": "true", "lora_r": "2", "lora_alpha": "8", "lora_target_modules": targets}
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        run(**flags, lora_kwargs=json.dumps(kwargs))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved | kwargs == saved
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert all("q_proj" in name or "v_proj" in name for name in names)
    assert any("layers.0" in name for name in names)
    assert any("layers.1" in name for name in names) != ("layers_to_transform" in kwargs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"lora_target_modules": "q_prj"},
            "--lora_target_modules q_prj: .* no such module; the nearest is q_proj",
        ),
        ({"lora_modules_to_save": "head"}, "--lora_modules_to_save head: LlamaForCausalLM has no such module"),
        ({"lora_target_modules": "("}, r"--lora_target_modules \(: LlamaForCausalLM has no such module"),
    ],
)
def test_modules_that_are_not_there(flags: dict[str, str], message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        run(use_peft="true", **flags)
    said = capsys.readouterr()
    assert "reference log-odds" not in said.err
    assert re.search(message, said.err)
