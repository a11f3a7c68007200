"""The analysis command: shifts against full logits, greedy responses token by token, and what it says of bad input."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from matplotlib.image import imread
from preference_rows import PAIRS, SINGLES
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bnf_train.analyze import __main__ as analyze
from bnf_train.analyze import figures as analyze_figures
from bnf_train.analyze import run as analyze_run
from bnf_train.analyze.figures import DISPLACEMENT, METRICS
from bnf_train.analyze.shifts import Sample, scores, shifts
from bnf_train.data import Collator, Response
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.lora import load_merged

Write = Callable[..., Path]


def moved(folder: Path, name: str, size: float) -> Path:
    """A copy of a model with every weight moved at random by about `size` of what it is."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + size * torch.randn_like(p))
    model.save_pretrained(folder.parent / name)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder.parent / name)
    return folder.parent / name


@pytest.fixture
def policy(model_folder: Path) -> Path:
    return moved(model_folder, "moved", 0.1)


def analysed(tmp_path: Path, *flags: object) -> dict[str, Any]:
    assert analyze.main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "out" / "analysis.json").read_text())
    return result


def by_hand(model: Any, ids: list[int], prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi and z of each response token, from the full logits of one response alone."""
    return by_hand_with_mass(model, ids, prompt_length)[:2]


def by_hand_with_mass(model: Any, ids: list[int], prompt_length: int) -> tuple[torch.Tensor, ...]:
    """The same, and max_j pi_j."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, prompt_length - 1 : -1].double()
    y = torch.tensor(ids[prompt_length:]).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, y)[:, 0], logits.gather(1, y)[:, 0], logits.softmax(-1).amax(-1)


def models(*folders: Path) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]


def prompt_and_response(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    start = tokenizer(text)["input_ids"]
    return start + tokenizer(response + "<|im_end|>")["input_ids"], len(start)


def test_a_policy_that_is_its_reference_has_not_moved(model_folder: Path, write_rows: Write, tmp_path: Path) -> None:
    flags = ("--policy", model_folder, "--reference", model_folder, "--data", write_rows(PAIRS), "--batch-size", 3)
    result = analysed(tmp_path, *flags)
    each = result["policies"]["tiny"]["responses"]
    assert each["preferred"] == [True, False] * 8
    assert each["row"] == [1 + i // 2 for i in range(16)]
    for metric in METRICS:
        assert each[metric] == [0] * 16
    assert each["displacement"] == [0] * 16  # ties are no falls
    assert each["argmax_mass"] == each["ref_argmax_mass"]
    assert result["figure4"]["edges"] == [0] * 9
    assert result["figure4"]["shares"]["tiny"] == pytest.approx([0.1] * 10)


def test_shifts_are_those_of_full_logits(
    model_folder: Path, policy: Path, tokenizer: Any, write_rows: Write, tmp_path: Path
) -> None:
    flags = ("--policy", policy, "--reference", model_folder, "--data", write_rows(SINGLES), "--batch_size", 5)
    result = analysed(tmp_path, *flags, "--names", "p")
    each = result["policies"]["p"]["responses"]
    both, all_shifts = models(policy, model_folder), []
    for i, row in enumerate(SINGLES):
        ids, start = prompt_and_response(tokenizer, row["prompt"], row["completion"])
        (logp, z, mass), (ref_logp, z_ref, ref_mass) = (by_hand_with_mass(model, ids, start) for model in both)
        shift, distance = logp - ref_logp, (z - z_ref).abs()
        fell = (shift < 0).double()
        displaced = [fell.mean().item(), ref_mass.mean().item(), mass.mean().item()]
        assert [each[m][i] for m in DISPLACEMENT] == pytest.approx(displaced, rel=1e-4)
        all_shifts += shift.tolist()
        n = len(shift)
        difference = (distance.unsqueeze(0) - distance.unsqueeze(1)).abs().sum() / (2 * n * distance.sum())
        expected = (shift.sum(), distance.sum(), shift.mean(), distance.mean(), difference)
        assert [each[m][i] for m in METRICS] == pytest.approx([x.item() for x in expected], rel=1e-3, abs=1e-4)
        assert (each["tokens"][i], each["preferred"][i], each["row"][i]) == (n, row["label"], i + 1)
    assert max(map(abs, all_shifts)) > 0.05
    assert result["figure4"]["edges"] == pytest.approx(np.quantile(all_shifts, [k / 10 for k in range(1, 10)]), abs=1e-4)
    summary = result["policies"]["p"]["summary"]
    assert {name: group["responses"] for name, group in summary.items()} == {"all": 12, "preferred": 4, "dispreferred": 8}
    for name, group in summary.items():
        values = [x for x, label in zip(each["gini"], each["preferred"], strict=True) if name in ("all", _label(label))]
        assert group["gini"] == pytest.approx({"mean": np.mean(values), "median": np.median(values)})
        of_label = [i for i, label in enumerate(each["preferred"]) if name in ("all", _label(label))]
        for m in DISPLACEMENT:
            of = [each[m][i] for i in of_label]
            assert group[m] == pytest.approx({"mean": np.mean(of), "median": np.median(of)})


def _label(preferred: bool) -> str:
    return "preferred" if preferred else "dispreferred"


def test_token_shifts_are_those_of_full_logits(model_folder: Path, policy: Path, tokenizer: Any) -> None:
    texts = [("a", "bcd"), ("one two", "three"), ("x", "y")]
    responses = [Response(*prompt_and_response(tokenizer, *text), True) for text in texts]
    sample = Sample(responses, [1, 2, 3])
    scored, expected = [], []
    for folder in (policy, model_folder):
        model = load_merged(str(folder), "--policy").eval()
        expected.append(torch.cat([by_hand(model, r.input_ids, r.prompt_length)[0] for r in responses]))
        attach_log_odds_head(model)
        scored.append(scores(model, sample, Collator(tokenizer.pad_token_id), torch.device("cpu"), None, 2))
        assert not model.get_output_embeddings()._forward_pre_hooks  # the hook is gone
    _, token_shifts = shifts(sample, *scored)
    torch.testing.assert_close(token_shifts.double(), expected[0] - expected[1], rtol=1e-4, atol=1e-5)


def test_greedy_responses_are_the_argmax_token_by_token(
    model_folder: Path,
    policy: Path,
    tokenizer: Any,
    write_rows: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = ["a", "What is 1 + 1?", "hello there", "z", "long " * 9]
    rows = [{"prompt": p, "completion": "x", "label": True} for p in (*prompts[:2], "a", *prompts[2:])]  # "a" comes twice

    def argmax(model: Any, prompt: str, ends: set[int]) -> tuple[list[int], list[int]]:
        ids, start = prompt_and_response(tokenizer, prompt, "")
        ids = ids[:start]
        while len(ids) < start + 6 and (len(ids) == start or ids[-1] not in ends):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[:start], ids[start:]

    # a token that the policy says somewhere ends its turns from now on, and the checkpoint would rather sample
    both, eos = models(policy, model_folder), tokenizer.eos_token_id
    end = argmax(both[0], prompts[1], {eos})[1][2]
    GenerationConfig(eos_token_id=[end, eos], do_sample=True, temperature=5.0, repetition_penalty=3.0).save_pretrained(policy)
    flags = ("--policy", policy, "--reference", model_folder, "--data", write_rows(rows), "--greedy", 4, "--max_new_tokens", 6)
    result = analysed(tmp_path, *flags, "--batch_size", 3)

    each = result["policies"]["moved"]["responses"]
    assert each["row"] == [1, 2, 4, 5]
    for i, prompt in enumerate(prompts[:4]):
        start, answer = argmax(both[0], prompt, {end, eos})
        assert each["text"][i] == tokenizer.decode(answer, skip_special_tokens=True)
        assert each["tokens"][i] == len(answer)
        assert each["cut"][i] == (answer[-1] not in {end, eos})
        (logp, z), (ref_logp, z_ref) = (by_hand(model, start + answer, len(start)) for model in both)
        assert each["log_likelihood_shift"][i] == pytest.approx((logp - ref_logp).sum().item(), abs=1e-4)
        assert each["logit_shift"][i] == pytest.approx((z - z_ref).abs().sum().item(), abs=1e-4)
    assert not all(each["cut"])
    assert f"moved: {sum(each['cut'])} of 4 responses cut at --max_new_tokens 6." in capsys.readouterr().out
    reference = [len(argmax(both[1], prompt, {eos})[1]) for prompt in prompts[:4]]
    assert result["reference_length"]["tokens"] == reference
    assert result["reference_length"]["mean"] == sum(reference) / 4
    assert result["reference_length"]["median"] == np.median(reference)


def test_an_adapter_is_the_model_that_it_makes(model_folder: Path, write_rows: Write, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "merged")
    flags = ("--reference", model_folder, "--data", write_rows(PAIRS), "--rows", 3)
    result = analysed(tmp_path, "--policy", tmp_path / "adapter", tmp_path / "merged", *flags)
    adapter, merged = (result["policies"][name]["responses"] for name in ("adapter", "merged"))
    assert len(adapter["row"]) == 6
    for metric in METRICS:
        assert adapter[metric] == pytest.approx(merged[metric], rel=1e-4, abs=1e-5)
    assert max(map(abs, adapter["log_likelihood_shift"])) > 0.1


@pytest.mark.usefixtures("rendered")
def test_one_model_at_a_time_and_figures(
    model_folder: Path,
    policy: Path,
    write_rows: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Any:
        assert [m for m in loaded if m() is not None] == []
        model = load_merged(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(analyze_run, "load_merged", watched)
    more = moved(model_folder, "more", 0.3)
    flags = ("--policy", policy, more, "--reference", model_folder, "--data", write_rows(PAIRS), "--bf16", "--bins_of", "more")
    result = analysed(tmp_path, *flags)
    assert len(loaded) == 3
    assert result["bf16"]
    assert result["figure4"]["bins_of"] == "more"
    assert result["figure4"]["shares"]["more"] == pytest.approx([0.1] * 10, abs=0.01)
    assert sum(result["figure4"]["shares"]["moved"]) == pytest.approx(1)
    assert max(result["figure4"]["shares"]["moved"]) > 0.15  # in the middle, as it moved less
    for name in ("figure3.png", "figure4.png", "displacement.png"):
        picture = imread(tmp_path / "out" / name)
        assert picture.shape[1] > 1000
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100
    figure = analyze_figures.draw_figure3(result)
    assert [axis.get_title(loc="left")[:3] for axis in figure.axes] == [f"({letter})" for letter in "abcdef"]
    assert all(axis.get_xlabel() for axis in figure.axes)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["moved, preferred", "moved, dispreferred", "more, preferred", "more, dispreferred"]
    printed = capsys.readouterr().out
    of = result["policies"]["more"]["summary"]["dispreferred"]
    assert "8 dispreferred" in printed  # the label stands in one piece
    assert f"{of['log_likelihood_shift']['mean']:+.2f}" in printed
    assert f"({of['gini']['median']:.3f})" in printed
    displaced = printed[printed.index("Displacement") :]
    for number in (
        f"{of['displacement']['mean']:.1%}",
        f"{of['ref_argmax_mass']['mean']:.3f}",
        f"{of['argmax_mass']['mean']:.3f}",
    ):
        assert number in displaced
    assert max(map(len, printed[printed.index("Shifts from") :].splitlines()[:-2])) <= 80
    figure = analyze_figures.draw_displacement(result)
    assert [axis.get_title(loc="left")[:3] for axis in figure.axes] == ["(a)", "(b)"]
    drawn = [collection.get_offsets().data[0].tolist() for collection in figure.axes[1].collections]
    more = result["policies"]["more"]["responses"]
    assert drawn[2] == [more["ref_argmax_mass"][0], more["argmax_mass"][0]]


PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"


def test_rows_are_read_as_for_training(
    model_folder: Path, policy: Path, tokenizer: Any, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another template, all of the assistant's turns, and what becomes of rows that are not as they should be."""
    (tmp_path / "plain.jinja").write_text(PLAIN)
    talk = [("user", "One?"), ("assistant", "Uno."), ("user", "And two?")]
    prompt = [{"role": role, "content": content} for role, content in talk]
    answer = [{"role": "assistant", "content": "Dos."}]
    rows = [{"prompt": prompt, "completion": answer, "label": True}, {"prompt": "Three?", "completion": "", "label": True}]
    flags = ["--policy", policy, "--reference", model_folder, "--data", write_rows(rows), "--empty", "drop", "--names", "p"]
    flags += ["--chat_template", tmp_path / "plain.jinja", "--max_length", 200]
    (tmp_path / "last").mkdir()
    (tmp_path / "all").mkdir()
    last = analysed(tmp_path / "last", *flags)["policies"]["p"]["responses"]
    every = analysed(tmp_path / "all", *flags, "--train_on", "all_assistant")["policies"]["p"]["responses"]
    assert "1 rows dropped because a response is empty" in capsys.readouterr().out
    text = tokenizer("[One?][Uno.][And two?][Dos.]<|im_end|>")["input_ids"]  # a byte a token; the end of the last turn is added
    places = {"Uno.]": range(7, 12), "Dos.]": range(23, 29)}
    assert len(text) == 29
    both = models(policy, model_folder)
    with torch.no_grad():
        logp, ref_logp = (
            model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
            for model in both
        )
    shift = {turn: (logp - ref_logp)[[at - 1 for at in of]].sum().item() for turn, of in places.items()}
    assert last["log_likelihood_shift"] == pytest.approx([shift["Dos.]"]], rel=1e-3, abs=1e-4)
    assert every["log_likelihood_shift"] == pytest.approx([sum(shift.values())], rel=1e-3, abs=1e-4)


def test_a_policy_with_another_template_is_said(
    model_folder: Path, policy: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policy / "chat_template.jinja").write_text(PLAIN)
    analysed(tmp_path, "--policy", policy, "--reference", model_folder, "--data", write_rows(PAIRS))
    assert f"--policy {policy}: its chat template is not --reference's, which is used" in capsys.readouterr().out


def test_bad_input_is_one_sentence(
    model_folder: Path, policy: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in (("full", "notes.txt"), ("adapter", "adapter_config.json"), ("no_weights", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "no_weights" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder)}))
    other = moved(model_folder, "other", 0.0)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    good = {"--policy": [policy], "--reference": [model_folder], "--data": [write_rows(PAIRS)]}
    bad: list[tuple[dict[str, list[object]], str]] = [
        ({"--policy": [tmp_path / "none"]}, f"--policy {tmp_path / 'none'}: no such folder"),
        ({"--policy": [policy, policy]}, "--policy: expected different ones"),
        ({"--policy": [other]}, "another vocabulary than --reference's"),
        ({"--policy": [tmp_path / "adapter"]}, "names no base_model_name_or_path"),
        ({"--policy": [tmp_path / "no_weights"]}, "adapter_model.safetensors, found none"),
        ({"--reference": [tmp_path / "full"]}, f"--reference {tmp_path / 'full'}: expected a model folder with a config.json"),
        ({"--data": [tmp_path / "no.jsonl"]}, "no.jsonl: no such file"),
        ({"--data": [write_rows([{"prompt": "a", "chosen": "b"}], "half.jsonl")]}, "half.jsonl, row 1"),
        ({"--names": ["a", "b"]}, "--names: expected one for each of the 1 policies, got 2"),
        ({"--bins_of": ["dpo"]}, "--bins_of dpo: expected the name of a policy, one of moved"),
        ({"--output_dir": [tmp_path / "full"]}, "expected a new or empty folder"),
        ({"--output_dir": [tmp_path / "full" / "notes.txt" / "x"]}, "not a directory"),
        ({"--greedy": [0]}, "--greedy: expected at least 1, got 0"),
        ({"--greedy": ["two"]}, "--greedy: expected int, got 'two' (python -m bnf_train.analyze --help lists every flag)"),
        ({"--greedy": [1], "--max_new_tokens": [250]}, "--max_new_tokens 250: the prompt of"),
        ({"--batch_sise": [3]}, "--batch_sise: no such flag; the nearest is --batch_size"),
        ({"--policy": []}, "--policy: expected at least one argument"),
        ({"--greedy": [1], "--train_on": ["all_assistant"]}, "--train_on all_assistant: a greedy response is one turn"),
        ({"--template_date": ["today"]}, "--template_date: expected a day as YYYY-MM-DD, got today"),
        ({"--chat_template": [tmp_path / "no.jinja"]}, "no.jinja"),
        ({"--chat_template_kwargs": ["[1]"]}, "--chat_template_kwargs [1]: expected a JSON object"),
        ({"--duplicates": ["twice"]}, "--duplicates: "),
    ]
    for change, words in bad:
        flags = {"--output_dir": [tmp_path / "out"]} | good | change
        assert analyze.main([str(x) for name, values in flags.items() for x in (name, *values)]) == 2, words
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
