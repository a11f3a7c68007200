"""The trainer's loss, its normalisation, and a run from rows to a model folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import PAIRS, SINGLES
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_core import OBJECTIVES, linear_token_loss, objective, objective_spec
from bnf_train.__main__ import main
from bnf_train.data import Collator, Row, mismatch, passes, tokenize
from bnf_train.flags import parse
from bnf_train.model import head as model_head
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model, load_tokenizer
from bnf_train.run import run
from bnf_train.training.reference_cache import add_ref_log_odds
from bnf_train.training.resume import ResumeMixin
from bnf_train.training.trainer import BNFTrainer

WriteRows = Callable[..., Path]


def one_step(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Weights after one step of `trainer_of`, of plain gradient descent, in float32: the gradient, in effect."""
    trainer = trainer_of(*arguments, **options)
    trainer.train()
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def trainer_of(
    folder: Path,
    rows: list[dict[str, Any]],
    per_device: int,
    accumulate: int,
    objective: str = "bnf",
    *,
    packed: bool = False,
    with_empty_rows: bool = False,
    tokens_per_pass: int = 0,
    train_on: str = "last",
) -> BNFTrainer:
    """Its reference is not its policy, so that w is not 1."""
    flags = ["--max_steps", "1", "--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--warmup_steps", "0"]
    config = parse(
        [
            *("--model", str(folder), "--dataset", "unused", "--output_dir", str(folder / "out"), "--bf16", "false"),
            *("--per_device_train_batch_size", str(per_device), "--gradient_accumulation_steps", str(accumulate)),
            *("--save_strategy", "no", "--disable_tqdm", "true", "--tokens_per_pass", str(tokens_per_pass), *flags),
        ]
    )
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    attach_log_odds_head(model)
    collator = Collator(tokenizer.pad_token_id)
    data, _ = tokenize(rows, tokenizer, 128, "rows", train_on=train_on)
    every = data + (mismatch(data, 128) if objective_spec(OBJECTIVES[objective]).reference_point else [])
    add_ref_log_odds(model, every, collator, config.device, False, 3)
    for row in every:  # a reference that is not the policy, so that w is not 1
        for response in row.responses:
            response.ref_log_odds += 0.5  # type: ignore[operator]
    if with_empty_rows:  # as where another process has one row more
        data = [row for pair in zip(data, [Row("", [])] * len(data), strict=True) for row in pair]
    collator.packed = packed
    return BNFTrainer(
        model=model,
        args=config,
        objective=OBJECTIVES[objective],
        data_collator=collator,
        train_dataset=data,
        processing_class=tokenizer,
    )


GROUP = {"prompt": "hello", "completions": ["well", "badly", "so so"], "labels": [True, False, False]}
APART = [
    {"prompt": "hello", "completion": text, "label": label}
    for text, label in zip(GROUP["completions"], GROUP["labels"], strict=True)
]


@pytest.mark.parametrize("objective", ["bnf", "kto", "log_likelihood", "npo"])
def test_a_group_is_its_responses(model_folder: Path, objective: str) -> None:
    """The same step, and the same held-out metrics, as with a row each; +1 and -1 are the labels; a 0 is left out."""
    other = {"prompt": "bye", "completion": "now", "label": True}
    expected = one_step(model_folder, [*APART, other], 4, 1, objective)
    scored = {k: v for k, v in GROUP.items() if k != "labels"} | {"scores": [1, -1.0, "-1"]}
    for group in (GROUP, scored):
        found = one_step(model_folder, [group, other], 2, 1, objective)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, msg=name)
    with_zero = scored | {"completions": [*GROUP["completions"], "no"], "scores": [1, -1, -1, 0]}
    rows, counts = tokenize([with_zero], load_tokenizer(str(model_folder)), 100, "rows")
    assert (len(rows[0].responses), counts.zero) == (3, [1])
    apart, together = (
        {k: v for k, v in trainer.evaluate(trainer.train_dataset).items() if "time" not in k and "second" not in k}
        for trainer in (trainer_of(model_folder, rows, 2, 1, objective) for rows in ([*APART, other], [GROUP, other]))
    )
    assert apart == pytest.approx(together)


def test_a_score_weighs_its_response(model_folder: Path) -> None:
    """Plain gradient descent: a score of -3 moves the weights three times as far as one of -1."""
    before = load_model(str(model_folder)).state_dict()
    one, three = (
        one_step(model_folder, [{"prompt": "hello", "completion": "well", "score": score}], 1, 1) for score in (-1, -3.0)
    )
    for name, weight in before.items():
        torch.testing.assert_close(three[name] - weight, 3 * (one[name] - weight), msg=name)


@pytest.mark.parametrize(
    ("rows", "objective"),
    [(PAIRS, "bnf"), (SINGLES[:8], "bnf"), (SINGLES[:8], "kto"), (PAIRS, "dpo"), (PAIRS, "simpo")],
    ids=["pairs-bnf", "singles-bnf", "singles-kto", "pairs-dpo", "pairs-simpo"],
)
def test_the_step_does_not_depend_on_its_micro_batches(model_folder: Path, rows: list[dict[str, Any]], objective: str) -> None:
    """1 x 8, 2 x 4, 8 x 1: the mean is over the responses (pairs) of the step, of different lengths and labels."""
    whole = one_step(model_folder, rows, 8, 1, objective)
    before = load_model(str(model_folder)).state_dict()
    assert any((whole[k] - before[k]).abs().max() > 1e-3 for k in whole)
    for per_device, accumulate in ((4, 2), (2, 4), (1, 8)):
        for key, value in one_step(model_folder, rows, per_device, accumulate, objective).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5, msg=f"{per_device} x {accumulate}: {key}")


def test_the_step_does_not_depend_on_packing_or_empty_micro_batches(model_folder: Path) -> None:
    """Packed and padded; micro-batches without a preferred response, and without any response at all."""
    rows = sorted(SINGLES[:8], key=lambda row: row["label"])  # the first micro-batches have dispreferred responses only
    whole = one_step(model_folder, rows, 8, 1)
    for per_device, accumulate, options in (
        (8, 1, {"packed": True}),
        (2, 4, {"packed": True}),
        (16, 1, {"with_empty_rows": True}),
        (1, 16, {"with_empty_rows": True, "packed": True}),
    ):
        for key, value in one_step(model_folder, rows, per_device, accumulate, **options).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5, msg=f"{per_device} x {accumulate} {options}")


@pytest.mark.parametrize(("per_device", "accumulate"), [(8, 1), (2, 4)])
def test_ktos_reference_point_is_that_of_the_step(model_folder: Path, per_device: int, accumulate: int) -> None:
    """The mean of log pi - log pi_ref over mismatched responses, by transformers' own forward; then a constant."""
    trainer = trainer_of(model_folder, SINGLES[:8], per_device, accumulate, "kto")
    plain, ratios = AutoModelForCausalLM.from_pretrained(model_folder), []
    for row in trainer.train_dataset:
        for response in row.responses:
            for one in (response, response.mismatched):
                one.ref_log_odds -= 1
            other = response.mismatched
            logits = plain(torch.tensor([other.input_ids])).logits[0, other.prompt_length - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(other.input_ids[other.prompt_length :])[:, None])
            ratios.append(logps.sum() - logsigmoid(other.ref_log_odds).sum())
    z0 = torch.stack(ratios).mean().item()
    assert z0 > 1
    trainer.args.logging_steps = 1
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(z0, rel=1e-4)
    fixed = trainer_of(model_folder, SINGLES[:8], per_device, accumulate, "kto_fixed")
    for row in fixed.train_dataset:
        for response in row.responses:
            response.ref_log_odds -= 1
    fixed.objective = partial(OBJECTIVES["kto_fixed"], z0=z0)
    fixed.train()
    for (name, one), other in zip(trainer.model.state_dict().items(), fixed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_ktos_held_out_loss_does_not_depend_on_batches(model_folder: Path, batch: int) -> None:
    trainer = trainer_of(model_folder, SINGLES[:8], 8, 1, "kto")
    for row in trainer.train_dataset:
        for response in row.responses:
            response.mismatched.ref_log_odds -= 1
    trainer.args.per_device_eval_batch_size = 8
    whole = trainer.evaluate(trainer.train_dataset)
    trainer.args.per_device_eval_batch_size = batch
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    trainer.objective = partial(OBJECTIVES["kto"], beta=2.0)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] != pytest.approx(whole["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("objective", ["bnf", "log_likelihood", "dpo", "simpo"])
@pytest.mark.parametrize("most", [1, 130, 200])
def test_the_step_does_not_depend_on_its_passes(model_folder: Path, objective: str, most: int) -> None:
    """Passes of a packed batch: a loss per token's cut between responses, others' between rows, so that a pair stays one."""
    whole = one_step(model_folder, PAIRS, 8, 1, objective, packed=True)
    for key, value in one_step(model_folder, PAIRS, 8, 1, objective, packed=True, tokens_per_pass=most).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5, msg=key)


def test_passes_are_the_batch_in_parts(model_folder: Path) -> None:
    rows, _ = tokenize([*PAIRS, *SINGLES], load_tokenizer(str(model_folder)), 128, "rows")
    collator = Collator(1, packed=True)
    batch = collator(rows)
    for most, whole_rows in ((1, False), (1, True), (100, False), (300, True)):
        parts = passes(batch, most, whole_rows)
        for name, value in batch.items():
            if name not in ("response", "response_positions", "cu_seq_lens", "max_length"):
                together = torch.cat([part[name] for part in parts], dim=value.dim() - 1)
                assert torch.equal(together, value), name
        for part in parts:
            responses = len(part["row"])
            assert part["input_ids"].numel() <= most or responses <= (2 if whole_rows else 1)
            assert part["response"].unique().tolist() == list(range(responses))
            predicted = part["input_ids"][0, part["response_positions"] + 1]
            assert torch.equal(predicted, part["response_labels"])
            starts = (part["position_ids"][0] == 0).nonzero().flatten().tolist()
            assert part["cu_seq_lens"].tolist() == [*starts, part["input_ids"].numel()]
            assert part["max_length"] == int(part["position_ids"].max()) + 1
            if whole_rows:
                assert all(int((part["row"] == row).sum()) == int((batch["row"] == row).sum()) for row in part["row"])
    assert passes(batch, 1e9) == [batch]
    padded = Collator(1)(rows)
    assert passes(padded, 1) == [padded]


def test_a_micro_batch_is_one_pass_under_deepspeed(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine steps in the backward pass: a second pass would be a second step."""
    sizes: list[int] = []

    def step(trainer: BNFTrainer, model: Any, inputs: dict[str, torch.Tensor], number: Any = None) -> torch.Tensor:
        trainer.is_deepspeed_enabled = False  # there is no engine here
        sizes.append(len(inputs["row"]))
        return torch.zeros(())

    def first(trainer: BNFTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        trainer.is_deepspeed_enabled = True
        return taken(trainer, *args, **kwargs)

    taken = BNFTrainer.training_step
    monkeypatch.setattr(ResumeMixin, "training_step", step)
    one_step(model_folder, PAIRS, 8, 1, packed=True, tokens_per_pass=1)
    assert len(sizes) > 1
    sizes.clear()
    monkeypatch.setattr(BNFTrainer, "training_step", first)
    one_step(model_folder, PAIRS, 8, 1, packed=True, tokens_per_pass=1)
    assert len(sizes) == 1


@objective(per="token")
def one_sided(log_odds: torch.Tensor, sign: torch.Tensor, ref_log_odds: torch.Tensor, *, power: float = 1.0) -> torch.Tensor:
    """Of one's own: w on dispreferred tokens only."""
    w = torch.where(sign > 0, 1, (log_odds.detach() - ref_log_odds).clamp(max=0).exp() ** power)
    return -sign * w * logsigmoid(log_odds)


@pytest.mark.parametrize("name", ["bnf", "bnf_binary", "log_likelihood", "one_sided"])
def test_a_loss_per_token_in_one_pass_is_the_objective_on_log_odds(
    name: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it does not recompute the logits: `linear_log_odds` is not called."""
    loss = partial(one_sided, power=0.5) if name == "one_sided" else OBJECTIVES[name]
    monkeypatch.setitem(OBJECTIVES, "one", loss)
    monkeypatch.setitem(OBJECTIVES, "two", lambda log_odds, batch: loss(log_odds, batch))  # says nothing of itself
    calls = []
    monkeypatch.setattr(model_head, "linear_token_loss", lambda *a, **k: calls.append(a) or linear_token_loss(*a, **k))
    ours = one_step(model_folder, PAIRS, 4, 2, "one")
    assert len(calls) == 2
    theirs = one_step(model_folder, PAIRS, 4, 2, "two")
    assert len(calls) == 2
    before = load_model(str(model_folder)).state_dict()
    assert any((ours[k] - before[k]).abs().max() > 1e-3 for k in ours)
    for key, value in theirs.items():
        torch.testing.assert_close(value, ours[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "beta"), [("dpo", 0.1), ("simpo", 2.0), ("bnf", 1.0)])
def test_rewards_are_the_objectives_own(objective: str, beta: float, model_folder: Path) -> None:
    """beta is the default of the objective where none is bound; 1 where it has none."""
    trainer = trainer_of(model_folder, PAIRS, 4, 2, objective)
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_rewards/chosen"] == pytest.approx(beta * found["eval_logp_shift/preferred"])
    assert found["eval_logp_shift/preferred"] < -1
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["rewards/rejected"] == pytest.approx(beta * found["eval_logp_shift/dispreferred"], rel=1e-4)


def test_dropout_is_switched_off_which_is_said(
    model_folder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise in training mode would make it another model than the reference."""
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    data = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--output_dir", str(tmp_path / "out")]
    assert main([*data, "--batch_size", "2", "--max_length", "100", "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert "its attention_dropout switched off" in capsys.readouterr().out


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("rows", [PAIRS, SINGLES], ids=["pairs", "singles"])
def test_a_run_leaves_a_model_that_plain_transformers_loads(
    rows: list[dict[str, Any]], model_folder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--batch_size", "4", "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--num_train_epochs", "3"]
    data = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--eval_size", "3", "--max_length", "100"]
    assert main([*data, *flags, "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Held-out responses" in printed
    assert "dispreferred" in printed

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generate(**tokenizer("hi", return_tensors="pt"), max_new_tokens=4).shape[1] > 2
    metrics = json.loads((out / "metrics.json").read_text())
    losses = [log["loss"] for log in metrics["log"] if "loss" in log]
    assert len(losses) == metrics["log"][-1]["step"] > 2
    first = metrics["log"][0]
    assert first["bnf/start_weight_error"] < 5e-3  # bf16 where the CPU multiplies it
    assert first["tokens_per_second"] > 0
    assert first["logps/chosen"] < 0
    assert first["rewards/chosen"] == pytest.approx(0, abs=0.1)  # a sum over tokens
    assert ("rewards/accuracies" in first) == (rows is PAIRS)
    logs = [log for log in metrics["log"] if "bnf/ratio_q10/preferred" in log]
    spread = [log["bnf/ratio_q90/preferred"] - log["bnf/ratio_q10/preferred"] for log in logs]
    assert max(spread) > min(spread) >= 0
    for label in ("preferred", "dispreferred"):  # policy = reference at the first step
        assert first[f"bnf/weight_mean/{label}"] == pytest.approx(1, abs=5e-3)
        assert metrics["held_out"][f"eval_bnf/weight_mean/{label}"] < 1
    shift = {k: metrics["held_out"][f"eval_logp_shift_per_token/{k}"] for k in ("preferred", "dispreferred")}
    assert shift["preferred"] != 0 != shift["dispreferred"]
    if rows is PAIRS:  # the singles' labels are arbitrary: nothing to learn for rows held out
        assert shift["preferred"] > shift["dispreferred"]
    assert metrics["held_out"]["eval_responses/dispreferred"] >= 1
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_held_out_is_nothing_evaluated(model_folder: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    flags = ["--eval_size", "0", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "1", "--batch_size", "2"]
    data = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--max_length", "100"]
    assert main([*data, *flags, "--output_dir", str(tmp_path / "out")]) == 0


def test_compiled_layers_compute_the_same(model_folder: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    """--torch_compile, with dynamo's own backend, which needs no C++ compiler: layers are traced, and the losses stay."""
    flags = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--max_length", "100", "--bf16", "false"]
    flags += ["--batch_size", "4", "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--disable_tqdm", "true"]
    losses = []
    for name, more in (("plain", []), ("compiled", ["--torch_compile_backend", "eager"])):
        config = parse([*flags, *more, "--output_dir", str(tmp_path / name)])
        trainer = run(config)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        compiled = [type(m).__name__ for m in trainer.model.modules() if m._compiled_call_impl is not None]
        assert compiled == (["LlamaDecoderLayer"] * 2 if more else [])
        assert trainer.accelerator.state.dynamo_plugin.backend == "NO"  # nothing is compiled a second time
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_sequences_are_no_longer_than_the_model_was_made_for(
    model_folder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows([*PAIRS, {"prompt": "long", "chosen": "a" * 400, "rejected": "b"}])
    flags = ["--max_steps", "1", "--batch_size", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["--model", str(model_folder), "--dataset", str(rows), *flags]) == 0
    printed = capsys.readouterr().out
    assert "256 it is" in printed
    assert "at --max_length 256, 1 responses cut, 0 rows dropped" in printed


def test_a_pairwise_objective_refuses_single_responses(
    model_folder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows([*PAIRS, SINGLES[0]])
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["--model", str(model_folder), "--dataset", str(rows), "--objective", "dpo", *out]) == 2
    assert "--objective dpo compares the two sides of a pair" in capsys.readouterr().err


def test_nothing_is_written_over(model_folder: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(PAIRS)
    before = sorted(p.name for p in model_folder.iterdir())
    assert main(["--model", str(model_folder), "--dataset", str(rows), "--output_dir", str(model_folder)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert sorted(p.name for p in model_folder.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "./nowhere"}, "--model ./nowhere: no such folder"),
        ({"--model": "."}, "expected a model folder with a config.json"),
        ({"--dataset": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"--dataset": "some/where/else"}, "expected a .jsonl, .json, .parquet, .arrow, .csv or .tsv file"),
    ],
)
def test_bad_paths_are_one_sentence_and_code_2(
    changed: dict[str, str], message: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--model": str(model_folder), "--dataset": "x.jsonl", "--output_dir": str(tmp_path / "out")} | changed
    assert main([part for pair in flags.items() for part in pair]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_the_hub_the_papers_preset_fails_in_one_sentence(tmp_path: Path) -> None:
    """In a process of its own, as a user would: one sentence with what was not fetched and what to pass instead."""
    command = [sys.executable, "-m", "bnf_train", "--model", "meta-llama/Meta-Llama-3-8B-Instruct"]
    environment = {"PATH": "", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --model meta-llama/Meta-Llama-3-8B-Instruct: the model could not be fetched")
    assert "pass --model with a local model folder" in last
