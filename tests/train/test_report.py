"""What a run leaves behind: the report in a real browser, the tokens in it, and the model card."""

import base64
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium  # type: ignore[import-not-found]
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from preference_rows import PAIRS, SINGLES
from transformers import PreTrainedTokenizerFast

from bnf_core import bnf_weight, token_log_odds
from bnf_train import report
from bnf_train.__main__ import main
from bnf_train.config import BNFConfig
from bnf_train.data import Collator, Row, tokenize
from bnf_train.flags import parse
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model, load_tokenizer
from bnf_train.report.examples import token_texts
from bnf_train.report.html import shift_color, shift_limit, weight_color

SCRIPT = "<script>window.injected = 1; console.error('injected')</script>"
BREAKOUT = "\"'><img src=x onerror=window.injected=1></style></title>&amp;"
LABELS = ("preferred", "dispreferred")


def some_examples() -> list[report.TokenExample]:
    """What data may hold: markup, a word as long as the page, right-to-left text, line breaks, parts of characters."""
    texts = [SCRIPT, " two", "\n", "", "é", "שלום", "w" * 300, BREAKOUT]
    weights, shifts = [1.0, 0.5, 0.0, 1.0, 0.9, 0.25, 1.0, math.nan], [0.2, -0.7, -30.0, 0.0, -0.1, -1.4, 0.01, math.nan]
    prompts = [f"{BREAKOUT}{SCRIPT} {'long ' * 90 * (i % 2)}" for i in range(8)]
    return [report.TokenExample(prompt, texts, weights, shifts, i % 2 == 0) for i, prompt in enumerate(prompts)]


def some_history() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Every key that a curve is drawn from."""
    held_out: dict[str, float] = {"eval_loss": 0.1, "eval_rewards/accuracies": 0.75}
    for sign, label in zip((1, -1), LABELS, strict=True):
        held_out |= {f"eval_responses/{label}": 4, f"eval_tokens/{label}": 4321, f"eval_logp_per_token/{label}": -1.5 + sign}
        held_out |= {f"eval_logp_shift_per_token/{label}": sign / 4, f"eval_bnf/weight_mean/{label}": 0.8}
        held_out |= {f"eval_bnf/weight_clipped/{label}": 0.4, f"eval_displacement/{label}": 0.3}
    history: list[dict[str, Any]] = []
    for step in range(1, 6):
        log = {"step": step, "epoch": step / 5, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-5 * step}
        log |= {"tokens_per_second": 500.0 + step, "rewards/accuracies": 0.5 + step / 10}
        log |= {f"rewards/{name}": step * 0.1 for name in ("chosen", "rejected", "margins")}
        for label in LABELS:
            log |= {f"bnf/weight_mean/{label}": 1 - step / 10, f"bnf/weight_clipped/{label}": 0.5}
            log |= {f"bnf/ratio_q{q}/{label}": (0.01 + q) / 50 for q in (10, 50, 90)}
        history += [log, {"step": step, **held_out}]
    return [*history, {"step": 5, "epoch": 1.0, "train_runtime": 90.0}], held_out


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> BNFConfig:
    return parse(["--model", str(model_folder), "--dataset", f"some/{BREAKOUT}", "--output_dir", str(tmp_path / "out")])


@pytest.fixture
def written(config: BNFConfig, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    report.write(folder, config, *some_history(), some_examples())
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if chromium.PROGRAM is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    with chromium.new_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.usefixtures("rendered")
def test_the_report_in_a_browser_on_a_phone(page: Any, written: Path) -> None:
    page.open(written / "report.html", width=360)
    assert page.evaluate("innerWidth") == 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("[...document.querySelectorAll('body *')].every(e => e.getBoundingClientRect().right <= 360.5)")
    assert page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 0).length") == 11  # the curves
    assert page.evaluate("[...document.querySelectorAll('article')].map(a => a.querySelectorAll('.t').length)") == [8] * 8

    first = "document.querySelector('article').querySelectorAll('.t')"
    limit = shift_limit(some_examples())

    def colors(kind: str) -> list[str]:
        page.evaluate(f"document.querySelector('label[for={kind}]').click()")
        shown = page.evaluate(f"[...{first}].map(t => getComputedStyle(t).backgroundColor)")
        return ["#" + "".join(f"{int(x):02x}" for x in re.findall(r"\d+", rgb)[:3]) for rgb in shown]

    example = some_examples()[0]
    assert colors("both") == colors("shift") == [shift_color(x, limit) for x in example.shift]
    assert colors("weight") == [weight_color(x) for x in example.weight]
    assert len(set(colors("weight"))) >= 5

    # a tap shows the numbers of that token, on the screen
    page.evaluate(f"{first}[1].scrollIntoView({{block: 'center'}})")
    # a token that breaks over two lines has two boxes
    page.tap(*page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])([...{first}[1].getClientRects()].at(-1))"))
    page.wait_for(f"document.activeElement == {first}[1]")
    shown = page.evaluate(f"(s => [s.content, s.position, s.bottom, s.width])(getComputedStyle({first}[1], '::after'))")
    assert shown == ['"2/8  two  w 0.500  shift -0.700 nats"', "fixed", "0px", "360px"]
    assert page.evaluate(f"getComputedStyle({first}[2], '::after').content") == "none"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    # text is text: nothing of the data has run, and nothing was said about it
    assert page.evaluate(f"{first}[0].textContent") == SCRIPT
    assert page.evaluate(f"{first}[7].textContent") == BREAKOUT
    assert BREAKOUT + SCRIPT in page.evaluate("document.querySelector('.prompt').textContent")
    assert page.evaluate("[typeof window.injected, document.scripts.length]") == ["undefined", 0]
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in page.events if event[0] in complaints] == []
    # one file: nothing else is asked for
    asked = [event["request"]["url"] for name, event in page.events if name == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(written / "report.html").as_uri()]

    for details in range(page.evaluate("document.querySelectorAll('details').length")):  # opened, all flags among them
        page.evaluate(f"document.querySelectorAll('details')[{details}].open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert base64.b64decode(page.call("Page.captureScreenshot")["data"]).startswith(b"\x89PNG")


@pytest.mark.usefixtures("rendered")
def test_the_page_of_a_run_without_held_out_rows(page: Any, config: BNFConfig, tmp_path: Path) -> None:
    report.write(tmp_path, config, [{"step": 1, "loss": 0.5}], {})
    page.open(tmp_path / "report.html", width=360)
    text = page.evaluate("document.body.innerText")
    assert "No rows were held out" in text
    assert "token by token" not in text
    assert page.evaluate("[document.images.length, document.documentElement.scrollWidth <= 360]") == [1, True]
    assert "No rows were held out" in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("rendered")
def test_the_file_needs_nothing_else_and_escapes_all_text(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;") >= 16
    assert "default-src 'none'" in html
    assert '<meta name="viewport" content="width=device-width' in html
    assert all(url.startswith("data:") for url in re.findall(r"(?:src|href)=\"([^\"]*)\"", html))
    assert "url(" not in html
    for shown in ("-0.5000", "+0.2500", "-0.2500", "4,321", "40.0%", "75.0%", "learning_<wbr>rate", "5e-07", "torch"):
        assert shown in html
    metrics = json.loads((written / "metrics.json").read_text())
    assert metrics["held_out"]["eval_loss"] == 0.1
    assert (written / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_an_alarm_stands_on_top_and_in_the_metrics(config: BNFConfig, tmp_path: Path) -> None:
    history, held_out = some_history()
    for fall, log in enumerate([log for log in history if "eval_loss" in log]):
        log["eval_logp_shift_per_token/preferred"] = -0.1 * fall
    report.write(tmp_path, config, history, held_out)
    (alarm,) = json.loads((tmp_path / "metrics.json").read_text())["alarms"]
    assert "-0.1000, -0.2000, -0.3000 nats per token" in alarm
    assert f'<p class="card notice">{alarm}</p>' in (tmp_path / "report.html").read_text()
    report.write(tmp_path, config, *some_history())
    assert "alarms" not in json.loads((tmp_path / "metrics.json").read_text())
    assert "card notice" not in (tmp_path / "report.html").read_text()


def test_colors() -> None:
    assert weight_color(0) != weight_color(0.5) != weight_color(1)
    assert shift_color(0.3, 1) != shift_color(-0.3, 1)
    assert shift_color(0, 1) == shift_color(-0.0, 1)
    assert shift_color(-math.inf, 2) == shift_color(-2, 2) == shift_color(-50, 2)  # full from the limit on
    assert weight_color(math.nan) == shift_color(math.nan, 1) == "#cccccc"
    for color in [weight_color(i / 20) for i in range(21)] + [shift_color(i / 10, 1) for i in range(-10, 11)]:
        assert (luminance(color) + 0.05) / (luminance("#17171c") + 0.05) > 4.5  # text is readable on it (WCAG AA)


def luminance(color: str) -> float:
    red, green, blue = (((int(color[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_one_outlier_does_not_set_the_scale() -> None:
    shifts = [0.1 * (-1) ** i for i in range(99)] + [-40.0]
    assert shift_limit([report.TokenExample("", [""] * 100, [1.0] * 100, shifts, True)]) == pytest.approx(0.1)
    assert shift_limit([report.TokenExample("", [""], [1.0], [0.0], True)]) == 1.0
    assert shift_limit([]) == 1.0


def trained(model_folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any, list[Row], Any]:
    """A policy that is not its reference, both known, and rows with the reference's log-odds."""
    tokenizer = load_tokenizer(str(model_folder))
    data, _ = tokenize(rows, tokenizer, 128, "rows")
    reference, policy = load_model(str(model_folder)).eval(), load_model(str(model_folder)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for row in data:
            for r in row.responses:
                r.ref_log_odds = log_odds(reference, r.input_ids)[r.prompt_length - 1 :]
    plain = load_model(str(model_folder)).eval()
    plain.load_state_dict(policy.state_dict())
    attach_log_odds_head(policy)
    return policy, plain, data, tokenizer


def log_odds(model: Any, ids: list[int]) -> torch.Tensor:
    """From the model's own logits, position by position."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return token_log_odds(logits, torch.tensor(ids[1:]))[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_examples_are_the_models_own_numbers(model_folder: Path, packed: bool) -> None:
    policy, plain, rows, tokenizer = trained(model_folder, PAIRS)
    policy.train()
    collator = Collator(tokenizer.pad_token_id, packed)
    examples = report.examples(policy, rows, collator, tokenizer, torch.device("cpu"), False, count=6)
    assert policy.training  # as it was
    assert [e.preferred for e in examples] == [True, False] * 3  # both sides of three pairs, spread over the rows
    responses = [r for i in (0, 2, 5) for r in rows[i].responses]
    assert len({e.prompt for e in examples}) == 3
    for example, response in zip(examples, responses, strict=True):
        ref = response.ref_log_odds
        assert ref is not None
        with torch.no_grad():
            now = log_odds(plain, response.input_ids)[response.prompt_length - 1 :]
        torch.testing.assert_close(torch.tensor(example.weight), bnf_weight(now, ref), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(example.shift), F.logsigmoid(now) - F.logsigmoid(ref), rtol=1e-4, atol=1e-5)
        assert "".join(example.tokens) == tokenizer.decode(response.input_ids[response.prompt_length :])
        assert len(example.tokens) == len(example.weight) == len(example.shift) == response.tokens
        assert "What is" in example.prompt
        assert "<|im_start|>" not in example.prompt
    assert min(min(e.weight) for e in examples) < 0.99
    assert max(max(e.shift) for e in examples) > 0.01


@pytest.mark.parametrize(
    ("labels", "count", "preferred", "dispreferred"),
    [([True, False] * 8, 8, 4, 4), ([False] * 12 + [True] * 2, 8, 2, 6), ([True] * 9, 8, 8, 0), ([True, False, True], 8, 2, 1)],
    ids=["plenty", "few-preferred", "one-label", "fewer-than-asked"],
)
def test_examples_are_balanced_over_labels(
    labels: list[bool], count: int, preferred: int, dispreferred: int, model_folder: Path
) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": label} for i, label in enumerate(labels)]
    policy, _, data, tokenizer = trained(model_folder, rows)
    collator = Collator(tokenizer.pad_token_id)
    examples = report.examples(policy, data, collator, tokenizer, torch.device("cpu"), False, count)
    assert [sum(e.preferred for e in examples), sum(not e.preferred for e in examples)] == [preferred, dispreferred]
    assert len({e.prompt for e in examples}) == len(examples)


def test_a_character_of_several_tokens_stands_with_its_last(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("aé🙂 b")
    assert token_texts(tokenizer, ids) == ["a", "", "é", "", "", "", "🙂", " ", "b"]
    assert token_texts(tokenizer, ids[:2]) == ["a", "\ufffd"]  # cut in the middle of a character
    assert token_texts(tokenizer, []) == []


def test_the_model_card(written: Path, model_folder: Path) -> None:
    card = ModelCard.load(written / "README.md")
    assert card.data.library_name == "transformers"
    assert {"alignment", "bnf"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder is not a name that the hub can link
    assert card.data.datasets == [f"some/{BREAKOUT}"]
    measured = {(r.metric_type, r.metric_name.split(", ")[-1]): r.metric_value for r in card.data.eval_results}
    assert measured["logp_shift_per_token", "preferred"] == 0.25
    assert measured["logp_shift_per_token", "dispreferred"] == -0.25
    for shown in (
        "`tiny`, aligned on",
        "| shift, nats per token | +0.2500 | -0.2500 |",
        "| learning_rate | 5e-07 |",
        "- transformers ",
        "8 held-out responses",
        "As Simple as Fine-tuning: LLM Alignment via Bidirectional Negative Feedback Loss",
    ):
        assert shown in card.content
    assert str(model_folder.parent) not in card.content  # no path of this machine


def test_the_model_card_names_what_the_hub_has(config: BNFConfig, tmp_path: Path) -> None:
    config.model, config.dataset = "some-org/Some-Model-1B", "some-org/some-preferences"
    (tmp_path / "adapter_config.json").write_text("{}")
    report.write(tmp_path, config, [], {})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some-org/Some-Model-1B"
    assert card.data.datasets == ["some-org/some-preferences"]
    assert card.data.library_name == "peft"
    assert "- peft " in card.content


def test_a_run_ends_with_its_report(model_folder: Path, write_rows: Callable[..., Path], page: Any, tmp_path: Path) -> None:
    rows = [*PAIRS[:-1], {"prompt": "Hi", "chosen": f"{SCRIPT} **", "rejected": "é🙂"}, *SINGLES[:4]]
    out = tmp_path / "out"
    data = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--eval_size", "6", "--max_length", "150"]
    steps = ["--batch_size", "2", "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--max_steps", "4"]
    assert main([*data, *steps, "--output_dir", str(out)]) == 0
    page.open(out / "report.html", width=360)
    assert page.evaluate("document.querySelectorAll('article').length") == 8
    assert page.evaluate("[...document.querySelectorAll('article')].every(a => a.querySelectorAll('.t').length > 1)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert ModelCard.load(out / "README.md").data.eval_results
