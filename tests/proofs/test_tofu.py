"""Unlearning on TOFU: its metrics against plain transformers and by hand, its rows, and stages that are not done twice."""

import doctest
import json
import math
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("scipy", reason="of the extra experiments")
pytest.importorskip("rouge_score", reason="of the extra experiments")
TOFU = Path(__file__).parents[2] / "proofs" / "experiments" / "tofu"
sys.path.insert(0, str(TOFU))

import run as command  # type: ignore[import-not-found]  # noqa: E402
import tofu_data  # type: ignore[import-not-found]  # noqa: E402
import tofu_metrics  # type: ignore[import-not-found]  # noqa: E402
from tofu_evaluate import Evaluation  # type: ignore[import-not-found]  # noqa: E402
from tofu_stages import Experiment  # type: ignore[import-not-found]  # noqa: E402

from bnf_train.errors import UsageError  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tofu() -> Any:
    return tofu_data.embedded(3)


@pytest.fixture(scope="module")
def model(tofu: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and a tokenizer made of TOFU's own words."""
    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator([row["question"] + " " + row["answer"] for row in tofu.forget], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the user's; figures are made, and not rendered."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


# --- rows --------------------------------------------------------------------------------------------------------------


def test_the_rows_are_tofus() -> None:
    whole = tofu_data.embedded()
    assert {len(row["perturbed_answer"]) for row in whole.forget + whole.retain} == {5}
    assert whole.forget[0]["question"].startswith("What is the full name of the author born in Kuwait City")
    assert all("Al-Kuwaiti" in row["question"] + row["answer"] for row in whole.forget[:1])
    assert len({row["question"] for row in whole.forget + whole.retain}) == 400
    assert [len(tofu_data.embedded(n).retain) for n in (3, 4, 20)] == [20, 40, 360]


def test_what_is_forgotten_is_never_retained(tofu: Any) -> None:
    with pytest.raises(UsageError, match="1 questions are to be forgotten and retained"):
        tofu_data.Tofu(tofu.forget, [*tofu.retain, tofu.forget[3]], {})
    with pytest.raises(UsageError, match="--authors 2: expected 3 to 20"):
        tofu_data.embedded(2)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_sees_both_labels(seed: int) -> None:
    whole = tofu_data.embedded()
    forgotten = {row["question"] for row in whole.forget}
    rows = tofu_data.to_unlearn(whole, seed, epochs=5, each=8)
    assert len(rows) == 25 * 16
    for start in range(0, len(rows), 16):
        assert [row["label"] for row in rows[start : start + 16]] == [False] * 8 + [True] * 8
    assert all((row["prompt"] in forgotten) is not row["label"] for row in rows)
    dispreferred = [row for row in rows if not row["label"]]
    for start in range(0, 200, 40):  # each pass has all of them
        assert {row["prompt"] for row in dispreferred[start : start + 40]} == forgotten
    assert len({row["prompt"] for row in rows if row["label"]}) == 200  # none of the 360 twice
    assert tofu_data.to_unlearn(whole, seed, 5, 8, forget_only=True) == dispreferred
    assert tofu_data.to_unlearn(whole, 2, 5, 8) != rows


def test_all_of_tofu_is_read_from_a_folder(tofu: Any, tmp_path: Path) -> None:
    names = ("forget05_perturbed", "retain95", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for name in names:
        tofu_data.write(tmp_path / f"{name}.json", tofu.forget if name == "forget05_perturbed" else tofu.retain)
    whole = tofu_data.complete(str(tmp_path), "forget05")
    assert (whole.forget, whole.retain, whole.utility["retain"]) == (tofu.forget, tofu.retain, tofu.retain)
    with pytest.raises(UsageError, match="forget10_perturbed"):
        tofu_data.complete(str(tmp_path))


# --- metrics -----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Mean over the answer's tokens and its end of turn of log pi, from full logits of plain transformers."""
    said: list[int] = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                add_generation_prompt=True), add_special_tokens=False)["input_ids"]  # fmt: skip
    own: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([said + own])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(said) - 1 + i, token]) for i, token in enumerate(own)) / len(own)


def test_log_probabilities_and_truth_ratio_by_hand(tofu: Any, model: Path) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    sets = {"forget": tofu.forget[:2], "real_authors": tofu.utility["real_authors"][:1]}
    found = Evaluation(sets, tokenizer, torch.device("cpu"), None, max_new_tokens=3).of_folder(str(model))
    assert {name: len(rows) for name, rows in found.items()} == {"forget": 2, "real_authors": 1}
    for name, rows in sets.items():
        for row, scores in zip(rows, found[name], strict=True):
            right = [row["answer"], *([row["paraphrased_answer"]] if name == "forget" else [])]
            wanted = [by_hand(plain, tokenizer, row["question"], x) for x in right + row["perturbed_answer"]]
            got = [scores["answer"], *([scores["paraphrase"]] if name == "forget" else []), *scores["perturbed"]]
            assert got == pytest.approx(wanted, abs=1e-4)
            others = [math.exp(x) for x in wanted[len(right) :]]
            ratio = math.prod(others) ** (1 / len(others)) / math.exp(wanted[len(right) - 1])
            assert tofu_metrics.truth_ratio(scores) == pytest.approx(ratio, rel=1e-3)
    assert found["forget"][0]["rouge"] == tofu_metrics.rouge_recall([tofu.forget[0]["answer"]], [found["forget"][0]["said"]])[0]


def scores(answer: float, *wrong: float, paraphrase: float | None = None, rouge: float = 0.5) -> dict[str, Any]:
    """Of probabilities."""
    more = {} if paraphrase is None else {"paraphrase": math.log(paraphrase)}
    return {"answer": math.log(answer), "perturbed": [math.log(x) for x in wrong], "rouge": rouge} | more


def test_metrics_of_given_probabilities() -> None:
    sets = {
        "forget": [scores(0.4, 0.1, 0.4, paraphrase=0.1), scores(0.2, 0.1, 0.1, paraphrase=0.4)],  # R = 2, 1/4
        "retain": [scores(0.5, 0.1, 0.4, paraphrase=0.8, rouge=1.0)],  # R = 1/4
        "world_facts": [scores(0.5, 0.1, 0.4), scores(0.2, 0.4, 0.4)],  # R = 0.4, 2
    }
    found = tofu_metrics.metrics(sets, sets)
    assert found["forget_probability"] == pytest.approx(0.3)
    assert found["forget_truth_ratio"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found["retain_truth_ratio"] == pytest.approx(0.75)
    assert found["world_facts_truth_ratio"] == pytest.approx((0.6 + 0) / 2)
    assert found["world_facts_probability"] == pytest.approx((0.5 + 0.2) / 2)  # both sum to 1
    six = [0.5, 1.0, 0.75, 0.35, 0.5, 0.3]
    assert found["model_utility"] == pytest.approx(6 / sum(1 / x for x in six))
    assert found["forget_quality"] == 1
    assert tofu_metrics.truth_ratio({"answer": -1e4, "perturbed": [0.0]}) < math.inf


def test_forget_quality_is_the_exact_p_value() -> None:
    """Two samples of three that do not overlap: 2 of the 20 ways to split six numbers are as far apart."""
    low, high = ([scores(0.5, wrong) for wrong in some] for some in ((0.1, 0.2, 0.3), (0.6, 0.7, 0.8)))
    assert tofu_metrics.forget_quality(low, high) == pytest.approx(2 / math.comb(6, 3))
    mixed = [scores(0.5, wrong) for wrong in (0.15, 0.25, 0.7)]
    assert tofu_metrics.forget_quality(low, mixed) == pytest.approx(1)


def test_rouge_is_recall_of_the_longest_common_subsequence() -> None:
    assert tofu_metrics.rouge_recall(["The cats sat there", "a b"], ["the cat there, and more", ""]) == [0.75, 0.0]


# --- stages ------------------------------------------------------------------------------------------------------------


def flags(model: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--output_dir", str(output), "--authors", "3", "--learn_epochs", "1", "--epochs", "0.25"),
        *("--rows_per_step", "8", "--eval_rows", "2", "--max_new_tokens", "2", "--seeds", "0", "--learning_rates", "1e-3"),
        *("--methods", "gradient_ascent", "bnf", "--workers", "1", *more),
    ]


def test_a_stopped_experiment_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tofu"
    unlearn, done = Experiment.unlearn, []

    def stopped(self: Experiment, arm: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(arm.name)
        unlearn(self, arm)

    monkeypatch.setattr(Experiment, "unlearn", stopped)
    assert command.main(flags(model, output)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    names = ["memorised-training", "memorised", "never_saw-training", "never_saw", "gradient_ascent-lr0.001-seed0"]
    written = {name: (output / "stages" / f"{name}.json").stat().st_mtime_ns for name in names}
    assert not (output / "stages" / "bnf-lr0.001-seed0.json").exists()
    assert list((output / "memorised").glob("*.safetensors"))
    assert not list((output / "never_saw").glob("*.safetensors"))  # measured, and not needed any more

    monkeypatch.setattr(Experiment, "unlearn", unlearn)
    (output / "stages" / "bnf-lr0.001-seed0.json").write_text('{"scores": {')  # of a machine that went down
    assert command.main(flags(model, output)) == 0
    assert {name: (output / "stages" / f"{name}.json").stat().st_mtime_ns for name in names} == written
    assert not (output / "arms" / "bnf-lr0.001-seed0").exists()

    results = json.loads((output / "results.json").read_text())
    stage = {
        run: json.loads((output / "stages" / f"{run}-lr0.001-seed0.json").read_text()) for run in ("gradient_ascent", "bnf")
    }
    never_saw = json.loads((output / "stages" / "never_saw.json").read_text())["scores"]
    assert [run["method"] for run in results["runs"]] == ["gradient_ascent", "bnf"]
    for run in results["runs"]:
        assert run["steps"] == 3  # 10 of 40 rows, 4 a step
        assert run["metrics"] == tofu_metrics.metrics(stage[run["method"]]["scores"], never_saw)
    assert {name: len(rows) for name, rows in never_saw.items()} == {
        "forget": 40, "retain": 2, "real_authors": 2, "world_facts": 2,
    }  # fmt: skip
    assert results["models"]["never_saw"]["forget_quality"] == 1
    before = results["models"]["memorised"]["forget_probability"]
    assert results["runs"][0]["metrics"]["forget_probability"] < before  # ascent pushes them down
    assert len((output / "results.md").read_text().splitlines()) == 2 + 2 + 2

    assert command.main(flags(model, output, "--learn_rate", "1e-3")) == 2
    assert "begun with learn_rate 0.0003 in place of 0.001" in capsys.readouterr().err


def test_arms_in_several_processes_are_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the arms, run here one behind the other."""
    shares: list[Any] = []

    class Pool:
        def __init__(self, workers: int, mp_context: Any) -> None:
            self.workers = workers

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: Any) -> None:
            assert len(shares) == self.workers

        def submit(self, work: Any, *arguments: Any) -> Any:
            shares.append(arguments[-1])
            work(*arguments)
            return self

        def result(self) -> None:
            pass

    monkeypatch.setattr("tofu_stages.ProcessPoolExecutor", Pool)
    assert command.main(flags(model, tmp_path / "tofu", "--workers", "2")) == 0
    assert [[arm.method for arm in share] for share in shares] == [["gradient_ascent"], ["bnf"]]
    assert len(json.loads((tmp_path / "tofu" / "results.json").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--rows_per_step", "7"], "--rows_per_step: expected an even number"),
        (["--use_peft"], "--use_peft: what is memorised would be an adapter"),
        (["--forget", "forget05"], "--forget: has no effect without --data"),
        (["--methods", "bfn"], "the nearest is bnf"),
        (["--methods", "bnf", "dpo"], "--methods dpo: compares the two sides of a pair"),
        (["--model", "no/such/folder"], "--model no/such/folder: no such folder"),
        (["--eval_row", "3"], "--eval_row: no such flag"),
    ],
)
def test_bad_flags_are_one_sentence(
    more: list[str], sentence: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(flags(model, tmp_path / "tofu", *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tofu").exists()


def test_examples_in_docstrings() -> None:
    for name in ("tofu_data", "tofu_metrics", "tofu_report", "tofu_stages"):
        found = doctest.testmod(sys.modules[name])
        assert found.attempted > 0, name
        assert found.failed == 0, name
