"""A prompt computed once: attention, packs and their parts, and a training step are what they are with a prompt each."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_rows import PAIRS
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bnf_core import OBJECTIVES
from bnf_train.__main__ import main
from bnf_train.data import Collator, Response, Row, by_prompt, logical_tokens, model_inputs, passes, spared, tokenize
from bnf_train.flags import parse
from bnf_train.model.attention import attend_varlen
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model, load_tokenizer
from bnf_train.model.lora import add_lora
from bnf_train.model.probe import can_share_prompts
from bnf_train.model.shared_prompts import SharedPromptAttention, SharedPrompts, Span, block_mask, flex, pieces
from bnf_train.training.distributed import GroupedRows, compile_layers
from bnf_train.training.reference_cache import add_ref_log_odds
from bnf_train.training.trainer import BNFTrainer

CPU = torch.device("cpu")
GROUPS = ((10, (3, 8, 5)), (0, (12,)), (4, (2, 9)), (15, (1,)))  # prompts, and responses to each


def spans_of(groups: Sequence[tuple[int, Sequence[int]]]) -> list[Span]:
    spans, end = [], 0
    for prompt, responses in groups:
        start, end = end, end + prompt
        for length in responses:
            spans.append(Span(start, start + prompt, end, end + length))
            end += length
    return spans


def seen(spans: Sequence[Span], window: int | None) -> Tensor:
    """(tokens, tokens): whether a token sees another, by the definition."""
    total = spans[-1].end
    mask = torch.zeros(total, total, dtype=torch.bool)
    for span in spans:
        places = [*range(span.prompt_start, span.prompt_end), *range(span.start, span.end)]
        for i, query in enumerate(places):
            for j, key in enumerate(places[: i + 1]):
                mask[query, key] = window is None or i - j < window
    return mask


@pytest.mark.parametrize("window", [None, 7, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_attention_behind_a_prompt(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    """Three heads of queries to one of keys; windows that end in a response, and before its prompt begins."""
    spans = spans_of(GROUPS)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, spans[-1].end, 16) for heads in (9, 3, 3, 9)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    ours = SharedPromptAttention.apply(q, k, v, *pieces(spans, window, q), 0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(spans, window), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for found, expected in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.child  # flex attention compiles itself
@pytest.mark.parametrize("window", [None, 7, 20])
def test_a_gpus_mask_is_the_same(window: int | None) -> None:
    """Flex attention's, uncompiled: its forward pass is all that it has on a CPU."""
    spans = spans_of(GROUPS)
    mask = block_mask(spans, window, CPU)
    places = torch.arange(spans[-1].end)
    found = torch.vmap(torch.vmap(lambda i, j: mask.mask_mod(0, 0, i, j), (None, 0)), (0, None))(places, places)
    assert torch.equal(found, seen(spans, window))
    q, k, v = (torch.randn(1, heads, spans[-1].end, 16) for heads in (9, 3, 3))
    expected = SharedPrompts(spans).attend(q, k, v, window, 0.3)
    torch.testing.assert_close(flex(q, k, v, mask, 0.3).transpose(1, 2), expected)


def test_nothing_of_the_packs_square_is_held() -> None:
    """Without a window no mask at all, and all responses to a prompt attend to it in one product."""
    own, shared = pieces(spans_of([(100, [50] * 8), (30, [20, 20])]), None, torch.zeros(()))
    assert [piece.mask for piece in own + shared] == [None] * 14
    assert [(p.queries, p.keys) for p in shared] == [(slice(100, 500), slice(0, 100)), (slice(530, 570), slice(500, 530))]


# --- batches -----------------------------------------------------------------------------------------------------------


def some_rows(*groups: tuple[int, Sequence[int]], together: bool = True) -> list[Row]:
    """A row for each group: prompts of so many tokens, and responses of so many to each; apart: a row for each response."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length, responses in groups:
        prompt = torch.randint(1, 50, (length,), generator=generator).tolist()
        # other tokens in the first place, so that no more than the prompt is shared
        answers = [[i, *torch.randint(1, 50, (n - 1,), generator=generator).tolist()] for i, n in enumerate(responses, 50)]
        of = [Response(prompt + x, length, i == 0, torch.full((len(x),), 0.5 * i)) for i, x in enumerate(answers)]
        rows += [Row("", of, group=len(of) != 2)] if together else [Row("", [r]) for r in of]
    return rows


ROWS = some_rows((7, (3, 9)), (4, (5,)), (6, (2, 8, 4)), (5, (1, 1)))


def test_a_pack_has_each_prompt_once() -> None:
    batch = Collator(0, packed=True, share_prompts=True)(ROWS)
    assert batch["spans"].tolist() == [
        *([0, 7, 7, 10], [0, 7, 10, 19], [19, 19, 19, 28], [28, 34, 34, 36], [28, 34, 36, 44], [28, 34, 44, 48]),
        *([48, 53, 53, 54], [48, 53, 54, 55]),
    ]
    alone = Collator(0, packed=True)(ROWS)
    assert logical_tokens(batch) == logical_tokens(alone) == alone["input_ids"].numel() == 79
    assert batch["input_ids"].numel() == 55 == 79 - sum(spared(ROWS, 4))
    assert (
        batch["input_ids"][0, batch["response_positions"]].tolist()
        == alone["input_ids"][0, alone["response_positions"]].tolist()
    )
    assert batch["position_ids"][0, 10:19].tolist() == list(range(7, 16))
    for name in ("response_labels", "response", "preferred", "row", "paired", "score", "ref_log_odds"):
        assert torch.equal(batch[name], alone[name])


def test_what_responses_have_in_common_is_shared_too() -> None:
    """With its tokens that count: earlier turns under --train_on all_assistant. No response is left without a token."""
    turns = [Response([5, 6, 7, 8, 9, 1], 2, True), Response([5, 6, 7, 8, 3], 2, False), Response([5, 6, 7, 8], 2, False)]
    batch = Collator(0, packed=True, share_prompts=True)([Row("", turns, group=True)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 8, 3, 8]]
    assert batch["response_labels"].tolist() == [7, 8, 9, 1, 7, 8, 3, 7, 8]
    assert batch["response_positions"].tolist() == [1, 2, 3, 4, 1, 2, 6, 1, 2]


def test_rows_of_one_prompt_stay_together_in_an_order_that_processes_do_not_change() -> None:
    rows = some_rows((7, (3, 9)), (4, (5, 2, 1)), (6, (2,)), together=False)
    shuffled = [rows[i] for i in (0, 2, 5, 1, 3, 4)]
    assert by_prompt(shuffled) == [[0, 3], [1, 4, 5], [2]]
    orders = []
    for epoch in range(6):
        sampler = GroupedRows(by_prompt(shuffled), [6, 7], seed=1)
        sampler.set_epoch(epoch)
        assert sorted(orders.append(list(sampler)) or orders[-1]) == list(range(8))  # type: ignore[func-returns-value]
        assert orders[-1][-2:] == [6, 7]
        assert orders[-1].index(3) == orders[-1].index(0) + 1
    assert len(set(map(tuple, orders))) > 2


# --- a step ------------------------------------------------------------------------------------------------------------


def gpt2() -> Any:
    """No part of it computes in float32 by itself, as normalisation does in most models."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    model: Any = GPT2LMHeadModel(config).double().eval()
    attend_varlen(model)
    attach_log_odds_head(model)
    return model


@pytest.mark.parametrize("most", [1000, 20, 9])
@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_odds_and_gradients_in_float64(most: int, whole_rows: bool, checkpointing: bool) -> None:
    """Whole and cut between responses, whose prompt is computed again."""
    model = gpt2()
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    found = []
    for share in (False, True):
        model.zero_grad()
        batch = Collator(0, packed=True, share_prompts=share)(ROWS)
        parts = passes(batch, most if share else 1000, whole_rows)
        assert (len(parts) > 1) == (share and most < 1000)
        log_odds = [model(**model_inputs(part))[0] for part in parts]
        torch.cat(log_odds).sin().sum().backward()
        found.append([torch.cat(log_odds).detach(), *(p.grad.clone() for p in model.parameters())])
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-12)


def test_no_key_of_a_prompt_is_copied_for_each_response() -> None:
    """What waits for the backward pass is as large as the pack, however many responses share its prompt."""
    held: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    spans = spans_of([(64, [2] * 16)])
    q, k, v = (torch.randn(1, 2, spans[-1].end, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        SharedPrompts(spans).attend(q, k, v, None, None)
    assert sum(held.values()) <= 4.5 * q.numel() * 4  # queries, keys, values, output, and a logsumexp for 8 numbers


def trainer_of(folder: Path, rows: list[dict[str, Any]], objective: str, share: bool, *flags: str) -> BNFTrainer:
    config = parse(
        [
            *("--model", str(folder), "--dataset", "unused", "--output_dir", str(folder / f"out-{share}"), "--bf16", "false"),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "1", "--optim", "sgd"),
            *("--learning_rate", "1", "--max_grad_norm", "0", "--warmup_steps", "0", "--save_strategy", "no"),
            *("--disable_tqdm", "true", *flags),
        ]
    )
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    attend_varlen(model)
    attach_log_odds_head(model)
    if config.torch_compile:
        compile_layers(model, "aot_eager", None)
    data, _ = tokenize(rows, tokenizer, 128, "rows")
    assert can_share_prompts(model, data, CPU)
    collator = Collator(int(tokenizer.pad_token_id), packed=True, share_prompts=share)
    add_ref_log_odds(model, data, collator, CPU, None, 3, progress=False)
    for row in data:  # a reference that is not the policy, so that w is not 1
        for response in row.responses:
            response.ref_log_odds += 0.5  # type: ignore[operator]
    torch.manual_seed(0)  # of an adapter
    return BNFTrainer(
        model=add_lora(model, config),
        args=config,
        objective=OBJECTIVES[objective],
        data_collator=collator,
        train_dataset=data,
        processing_class=tokenizer,
    )


ASKED = "Which of these words is the longest one of all that are here?"
GROUP = {"prompt": ASKED, "completions": ["well", "badly", "so so"], "labels": [True, False, False]}
SINGLES = [
    {"prompt": prompt, "completion": text, "label": label}
    for text, label in (("one", True), ("two", False), ("three", True))
    for prompt in (ASKED, "Say a number, please", "And another")[: 3 if label else 2]
]


@pytest.mark.parametrize(
    ("rows", "objective", "flags"),
    [
        (PAIRS, "bnf", ()),
        (PAIRS, "dpo", ()),
        (PAIRS, "dpo", ("--tokens_per_pass", "60")),
        ([GROUP, PAIRS[0], *SINGLES[:1]], "bnf", ("--tokens_per_pass", "70")),
        (SINGLES, "bnf", ()),
        (SINGLES, "kto", ("--tokens_per_pass", "90")),
        (PAIRS, "bnf", ("--use_peft", "--lora_r", "4", "--lora_modules_to_save", "lm_head")),
        (PAIRS, "bnf", ("--gradient_checkpointing",)),
        (PAIRS, "bnf", ("--bf16", "true")),
        # compiled layers take most of a minute, and a child
        pytest.param(PAIRS, "bnf", ("--torch_compile",), marks=[pytest.mark.child, pytest.mark.slow]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else x if isinstance(x, str) else f"{len(x)} rows",
)
def test_a_step_is_the_one_with_a_prompt_each(
    rows: list[dict[str, Any]], objective: str, flags: tuple[str, ...], model_folder: Path
) -> None:
    """Loss, gradient (a step of plain descent), logical tokens, in float32; the order of single rows is no part of it."""
    found = []
    for share in (False, True):
        trainer = trainer_of(model_folder, rows, objective, share, "--num_train_epochs", "1", *flags)
        trainer.train()
        log = trainer.state.log_history[0]
        assert share == (log["positions_per_second"] < 0.99 * log["tokens_per_second"])
        found.append((log["loss"], {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}))
    (alone, expected), (shared, weights) = found
    digits = 1e-5 if "--bf16" not in flags else 3e-2
    assert shared == pytest.approx(alone, rel=digits, abs=digits)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=digits, atol=2 * digits, msg=name)


def test_a_model_that_cannot_is_found_out() -> None:
    """Attention by another implementation, and a mask of the model's own making, for which it is another model."""
    model = gpt2()
    assert can_share_prompts(model, ROWS, CPU)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert not can_share_prompts(eager, ROWS, CPU)
    counting = copy.deepcopy(model)
    counting.transformer.wpe.register_forward_hook(
        lambda layer, args, out: out * (1 + torch.arange(out.shape[-2])[:, None] / 10)
    )
    assert not can_share_prompts(counting, ROWS, CPU)


@pytest.mark.parametrize(
    ("rows", "per_device", "said"),
    [
        # 16 prompts of 33 tokens and 224 of responses; less, 8 times, the prompt and the "I" of both sides
        (PAIRS, "1", ["Prompts are computed once: 480 positions an epoch for 752, 1.57 times fewer"]),
        (
            SINGLES,
            "4",
            ["8 rows with 3 prompts: those with one are kept together, shuffled as one.", "Prompts are computed once:"],
        ),
        (SINGLES, "1", ["Responses of one pass share a prompt: raise --per_device_train_batch_size"]),
    ],
    ids=["pairs", "singles", "singles one at a time"],
)
def test_the_start_of_a_run_says_what_is_shared(
    rows: list[dict[str, Any]],
    per_device: str,
    said: list[str],
    model_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--max_steps", "1", "--eval_size", "0", "--batch_size", "8", "--save_strategy", "no", "--no_reference_cache"]
    data = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--max_length", "128"]
    sizes = ["--per_device_train_batch_size", per_device]
    assert main([*data, *flags, *sizes, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in said), printed
    assert main([*data, *flags, *sizes, "--no_share_prompts", "--output_dir", str(tmp_path / "apart")]) == 0
    assert "rompts are" not in capsys.readouterr().out
