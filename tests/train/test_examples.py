"""The examples: short, run as written on the embedded demo, and their gradients are the paper's."""

import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bnf_core import OBJECTIVES, TokenBatch, reference
from bnf_train import demo
from bnf_train.__main__ import main
from bnf_train.data.read import read_rows

EXAMPLES = Path(__file__).parents[2] / "bnf_train" / "examples"
STEPS = (0, 2)  # of those that `gradients` keeps: at step 0 every weight is 1, later BNF's weights are at work


@pytest.fixture(autouse=True)
def _away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write into runs/


@pytest.fixture
def gradients() -> Iterator[dict[int, dict[int, tuple[Tensor, Tensor]]]]:
    """Of some optimizer steps: weight and gradient, by the id of the parameter."""
    kept: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    step = -1

    def keep(optimizer: Optimizer, *_: Any) -> None:
        nonlocal step
        step += 1
        if step in STEPS:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            kept[step] = {id(p): (p.detach().clone(), p.grad.clone()) for p in parameters}

    handle = register_optimizer_step_pre_hook(keep)
    yield kept
    handle.remove()


@pytest.fixture
def short_rows(tmp_path: Path) -> Path:
    """The four shortest rows of each label."""
    rows = sorted(read_rows(str(demo.PREFERENCES)), key=lambda row: len(row["prompt"] + row["completion"]))
    some = [row for label in (True, False) for row in [row for row in rows if row["label"] is label][:4]]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Path) -> dict[str, Any]:
    """The example as `python examples/name arguments` runs it; what it has defined at the end."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def shifts(output: str) -> tuple[float, float]:
    """The last (preferred, dispreferred) printed."""
    found = re.findall(r"preferred (\S+), dispreferred (\S+)", output)
    return float(found[-1][0]), float(found[-1][1])


def check_gradients(
    kept: dict[int, dict[int, tuple[Tensor, Tensor]]],
    model: PreTrainedModel,
    batch: tuple[Tensor, Tensor, Tensor],
    max_norm: float = math.inf,
) -> list[float]:
    """Each kept gradient is that of `reference.bnf_loss` on full logits, clipped; its norm before."""
    ids, labels, preferred = batch
    ref_model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    ref_logits = ref_model(ids).logits[:, :-1].detach()
    norms = []
    for step in STEPS:
        policy.zero_grad()
        weights = {name: kept[step][id(p)][0] for name, p in model.named_parameters()}
        policy.load_state_dict(weights, strict=False)
        reference.bnf_loss(policy(ids).logits[:, :-1], ref_logits, labels[:, 1:], preferred).backward()
        expected = {name: p.grad for name, p in policy.named_parameters()}
        norms.append(torch.stack([g.norm() for g in expected.values()]).norm().item())
        clip = min(1.0, max_norm / norms[-1])
        for name, p in model.named_parameters():
            got = kept[step][id(p)][1]
            torch.testing.assert_close(got, expected[name] * clip, rtol=1e-3, atol=1e-5 * clip * norms[-1])
    return norms


def padded(responses: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(r.input_ids) for r in responses], batch_first=True)
    labels = torch.full_like(ids, -100)
    for row, r in enumerate(responses):
        labels[row, r.prompt_length : len(r.input_ids)] = ids[row, r.prompt_length : len(r.input_ids)]
    return ids, labels, torch.tensor([r.preferred for r in responses])


def test_every_example_is_short_and_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 9
    for file in files:
        assert len(file.read_text().splitlines()) < 40, file
        assert f"examples/{file.name}" in readme


def test_plain_pytorch(gradients: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = run("plain_pytorch.py", monkeypatch)
    preferred, dispreferred = shifts(capsys.readouterr().out)
    assert preferred > 0 > dispreferred
    check_gradients(gradients, example["model"], padded(example["responses"]))


def test_transformers_trainer(
    gradients: Any, short_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight responses in four forward passes: one mean over all of them."""
    example = run("transformers_trainer.py", monkeypatch, demo.MODEL, short_rows)
    preferred, dispreferred = shifts(capsys.readouterr().out)
    assert preferred > 0 > dispreferred
    norms = check_gradients(gradients, example["model"], padded(example["responses"]), max_norm=1.0)  # Trainer's default
    logged = [entry["grad_norm"] for entry in example["trainer"].state.log_history if "grad_norm" in entry]
    assert [float(logged[step]) for step in STEPS] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("paired", [False, True], ids=["labels", "pairs"])
def test_trl_trainer(
    gradients: Any, short_rows: Path, paired: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """KTO's rows, and DPO's, of which TRL makes two each."""
    pytest.importorskip("trl", reason="TRL is no dependency; the example needs it")
    if paired:
        rows = read_rows(str(short_rows))
        pairs = [
            {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
            for good, bad in zip(rows[:4], rows[4:], strict=True)
        ]
        short_rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    example = run("trl_trainer.py", monkeypatch, demo.MODEL, short_rows)
    preferred, dispreferred = shifts(capsys.readouterr().out)
    assert preferred > 0 > dispreferred
    batch = next(iter(example["trainer"].get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    assert batch["label"].sum() == 4 == (~batch["label"]).sum()
    check_gradients(gradients, example["trainer"].model, (batch["input_ids"], labels, batch["label"]), max_norm=1.0)


def test_own_token_loss(short_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_token_loss.py", monkeypatch, demo.MODEL, short_rows)
    lines = capsys.readouterr().out.splitlines()
    (preferred, dispreferred), (preferred_after, dispreferred_after) = shifts(lines[0]), shifts(lines[-1])
    assert preferred_after - preferred > 0 > dispreferred_after - dispreferred


def test_the_objective_is_bnf_with_dispreferred_responses_weighed() -> None:
    weighted_bnf = runpy.run_path(str(EXAMPLES / "my_objective.py"))["weighted_bnf"]
    log_odds, ref_log_odds = torch.randn(5), torch.randn(5)
    batch = TokenBatch(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False]), ref_log_odds=ref_log_odds)
    bnf = OBJECTIVES["bnf"](log_odds, batch)
    torch.testing.assert_close(weighted_bnf(log_odds, batch, dispreferred_weight=1.0), bnf)
    torch.testing.assert_close(weighted_bnf(log_odds, batch), bnf * torch.tensor([1.0, 0.5]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with the example's objective leaves behind."""
    folder = tmp_path_factory.mktemp("checkpoint")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read_rows(str(demo.PREFERENCES))[:32]))
    flags = {"dataset": rows, "output_dir": folder / "run", "eval_size": 8, "eval_strategy": "no", "disable_tqdm": True}
    flags |= {"per_device_train_batch_size": 8, "batch_size": 8, "num_train_epochs": 2, "dispreferred_weight": 0.7}
    flags |= {"objective": f"{EXAMPLES / 'my_objective.py'}:weighted_bnf"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert main([*arguments, "--no_reference_cache"]) == 0
    return folder / "run"


def test_own_objective(checkpoint: Path) -> None:
    log = json.loads((checkpoint / "metrics.json").read_text())
    last = [entry for entry in log["log"] if "rewards/chosen" in entry][-1]
    assert last["rewards/chosen"] > 0 > last["rewards/rejected"]


def sums(n: int) -> list[dict[str, str]]:
    """Of the embedded questions, those whose answers are numbers."""
    rows = [json.loads(line) for line in demo.CHECK.read_text().splitlines()]
    return [{"question": row["prompt"], "answer": row["answer"]} for row in rows if row["prompt"].startswith("Compute")][:n]


def test_a_checkpoint_answers_what_a_benchmark_asks(checkpoint: Path) -> None:
    """It loads in transformers, its template renders a question, and its answer ends and can be parsed."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    (row,) = sums(1)
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("<|assistant|>")
    answer = model.generate(**prompt, max_new_tokens=120, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert re.fullmatch(r"-?[0-9]+", tokenizer.decode(answer[:-1]))


@pytest.mark.slow  # starts another Python with lm_eval, half a minute
def test_lm_eval_asks_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The task file of the README, on questions of the embedded data."""
    pytest.importorskip("lm_eval", reason="lm_eval is no dependency; pip install lm_eval")
    readme = (EXAMPLES / "README.md").read_text()
    (task,) = re.findall(r"```yaml\n(task: word_problems\n.*?)```", readme, re.DOTALL)
    (tmp_path / "word_problems.yaml").write_text(task)
    questions = sums(4)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    command = f"--model hf --model_args pretrained={checkpoint} --include_path . --tasks word_problems --apply_chat_template"
    rest = "--batch_size 4 --device cpu --log_samples --output_path out"
    subprocess.run([sys.executable, "-m", "lm_eval", *command.split(), *rest.split()], check=True)
    (samples,) = (tmp_path / "out").rglob("samples_word_problems_*.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [answer["target"] for answer in answers] == [question["answer"] for question in questions]
    assert any(re.fullmatch(r"-?[0-9.,]+", answer["filtered_resps"][0]) for answer in answers)
