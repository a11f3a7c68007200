"""The log-odds head on real architectures computes what their own logits say."""

import copy
import math
import pickle
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bnf_core import TokenBatch, bnf, linear_log_odds, reference, token_log_odds
from bnf_train.data import Collator, Response, Row, model_inputs, packed
from bnf_train.errors import UsageError
from bnf_train.model import head as model_head
from bnf_train.model.attention import NAME, PackedResponses, attend_varlen, attention_width
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.probe import can_pack

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOWED: dict[str, dict[str, Any]] = {  # what a token sees of its response is less than all before it
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 4, "intermediate_size_mlp": 24, "num_local_experts": 2, "pad_token_id": 1},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "phi": {},  # a head with a bias
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
}


def tiny(name: str, **more: Any) -> PreTrainedModel:
    options = SIZES | {"model_type": name} | ARCHITECTURES.get(name, {}) | more
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), attn_implementation="eager").eval()


def packs(model: PreTrainedModel) -> bool:
    rows = [Row("", [Response(torch.randint(37, (n,)).tolist(), 1, True)]) for n in (8, 9, 5)]
    return can_pack(model, rows, 2, True, torch.device("cpu"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_odds_and_gradients_are_those_of_the_logits(name: str) -> None:
    plain, ours = tiny(name), tiny(name)
    if ours.get_output_embeddings().bias is not None:
        for model in (plain, ours):
            torch.nn.init.normal_(model.get_output_embeddings().bias, generator=torch.Generator().manual_seed(1))
    attach_log_odds_head(ours)
    ids = torch.randint(37, (3, 9))
    positions = torch.tensor([0, 3, 7, 9, 10, 25])
    labels = ids.flatten()[positions + 1]
    log_odds, _ = ours(input_ids=ids, response_positions=positions, response_labels=labels)
    expected, _ = token_log_odds(plain(input_ids=ids).logits.flatten(0, 1)[positions], labels)
    torch.testing.assert_close(log_odds, expected, rtol=1e-4, atol=1e-5)
    log_odds.sum().backward()
    expected.sum().backward()
    theirs = dict(plain.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-3, atol=1e-4, msg=key)


def test_without_response_positions_the_model_is_what_it_was() -> None:
    model = tiny("llama")
    ids = torch.randint(37, (1, 5))
    before = model(input_ids=ids).logits
    attach_log_odds_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1).shape == (1, 8)


def test_an_unknown_head_is_refused() -> None:
    scaled = tiny("granite")
    forward = scaled.forward

    def other_head(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits + torch.arange(37) / 10
        return output

    scaled.forward = other_head
    with pytest.raises(UsageError, match="of a kind that is not supported"):
        attach_log_odds_head(scaled)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_weights_pass_and_another_head_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own bf16 logits are rounded; ours are not, and the check still tells a wrong bias, scale or softcap."""
    model = tiny(name).bfloat16()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(8)  # logits of tens, which bf16 rounds by more than a head may be off
        if head.bias is not None:
            torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(9).unsqueeze(0)
    exact = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float() @ head.weight.float().T
    assert name in ("gemma2", "cohere", "granite", "phi") or (model(input_ids=ids).logits - exact).abs().max() > 1e-2
    attach_log_odds_head(model)
    assert packs(model)
    cap, scale = model_head._softcap_and_scale(model)
    assert (cap, scale) == pytest.approx((5.0 if name == "gemma2" else None, {"cohere": 0.3, "granite": 0.25}.get(name, 1)))
    wrong: list[tuple[str, Any]] = [("_softcap_and_scale", lambda _: (cap, 1.02 * scale))]
    if cap is not None:
        wrong.append(("_softcap_and_scale", lambda _: (1.05 * cap, scale)))
    if head.bias is not None:
        wrong.append(("LogOddsHead", WithoutBias))
    for function, other in wrong:
        with monkeypatch.context() as patch:
            patch.setattr(model_head, function, other)
            with pytest.raises(UsageError, match="of a kind that is not supported"):
                attach_log_odds_head(model)


class WithoutBias(model_head.LogOddsHead):
    def __call__(self, hidden: Tensor, response_labels: Tensor | None = None, *args: Any) -> Any:
        if response_labels is None:
            return super().__call__(hidden)
        weight: Any = self.head.weight
        return linear_log_odds(hidden, weight, response_labels, softcap=self.softcap, logit_scale=self.logit_scale)


def copies(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    return {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_a_copy_computes_with_its_own_weight(name: str, tmp_path: Path) -> None:
    """Of the model, and of its head alone, as peft makes of it; what is saved is named as transformers names it."""
    model = tiny(name)
    attach_log_odds_head(model)
    inputs = {"input_ids": torch.arange(9).unsqueeze(0), "response_positions": torch.arange(8)}
    inputs["response_labels"] = torch.arange(1, 9)
    before = model(**inputs)[0].detach()
    for how, other in copies(model).items():
        torch.testing.assert_close(other(**inputs)[0], before, rtol=0, atol=0, msg=how)
        with torch.no_grad():
            other.get_output_embeddings().weight.mul_(2)
        assert (other(**inputs)[0] - before).abs().max() > 1e-2, how
        logits = other(input_ids=inputs["input_ids"]).logits[0, :8]
        torch.testing.assert_close(other(**inputs)[0], token_log_odds(logits, inputs["response_labels"])[0], msg=how)
        assert torch.equal(model(**inputs)[0], before), how
    head, hidden, labels = model.get_output_embeddings(), torch.randn(8, 16), inputs["response_labels"]
    one = copy.deepcopy(head)
    with torch.no_grad():
        one.weight.mul_(2)
    assert not torch.equal(one(hidden, labels)[0], head(hidden, labels)[0])
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.architectures == [type(tiny(name)).__name__]


def test_head_and_objective_are_the_papers_loss() -> None:
    """From token ids to eq. 4 on a real model: the shift, the masks, the lengths."""
    policy, ref = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = [
        Row("a", [Response([3, 4, 5, 6, 7], 2, True), Response([3, 4, 9], 2, False)]),
        Row("b", [Response([8, 3, 1, 2, 6, 1, 1], 3, False)]),
    ]
    batch = Collator(pad_token_id=1)(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.full_like(ids, -100)
    for i, response in enumerate(r for row in rows for r in row.responses):
        for t in range(response.prompt_length, len(response.input_ids)):
            labels[i, t - 1] = response.input_ids[t]
    with torch.no_grad():
        expected = reference.bnf_loss(
            policy(input_ids=ids, attention_mask=mask).logits,
            ref(input_ids=ids, attention_mask=mask).logits,
            labels,
            batch["preferred"],
        )
    for model in (policy, ref):
        attach_log_odds_head(model)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "response_positions", "response_labels")}
    log_odds, entropy = policy(**inputs)
    ref_log_odds, _ = ref(**inputs)
    tokens = TokenBatch(batch["response"], batch["preferred"], ref_log_odds=ref_log_odds.detach(), entropy=entropy)
    torch.testing.assert_close(bnf(log_odds, tokens).mean(), expected, rtol=1e-5, atol=1e-6)


@torch.compiler.set_stance("force_eager")  # flex_attention uncompiled: minutes of a C++ compiler
@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_varlen", pytest.param("flex_attention", marks=pytest.mark.child)])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "cohere", "phi"])
def test_packed_log_odds_are_the_padded_ones(name: str, attention: str) -> None:
    """For every attention implementation on a CPU; responses of very different lengths, in both orders."""
    model = tiny(name)
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        pytest.skip(f"transformers: {str(error).splitlines()[0][:100]}")
    attach_log_odds_head(model)
    assert packs(model)
    lengths = ((3, 9), (2, 30), (5, 6), (1, 12))
    rows = [Row("p", [Response(torch.randint(37, (n,)).tolist(), k, True)]) for k, n in lengths]
    for ordered in (rows, rows[::-1]):
        padded, packed = Collator(1)(ordered), Collator(1, packed=True)(ordered)
        assert "position_ids" in packed
        assert "attention_mask" in padded
        with torch.no_grad():
            expected, _ = model(**model_inputs(padded))
            log_odds, _ = model(**model_inputs(packed))
        torch.testing.assert_close(log_odds, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_varlen_attention_has_the_gradients_of_attention_over_the_whole(name: str) -> None:
    """And cuts where responses begin: it calls scaled_dot_product_attention once for each."""
    whole, cut = tiny(name), tiny(name)
    for model in (whole, cut):
        model.set_attn_implementation("sdpa")
    attend_varlen(cut)
    assert cut.config._attn_implementation == NAME
    inputs = model_inputs(packed(torch.randint(37, (20,)).split([9, 1, 10])))
    outputs, counts = [], []
    for model in (whole, cut):
        with unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=sdpa) as attention:
            outputs.append(model(**inputs, use_cache=False).logits)
        counts.append(attention.call_count)
        outputs[-1].square().sum().backward()
    assert counts == [2, 6]  # layers, times responses
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for (key, one), other in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", WINDOWED)
def test_varlen_attention_of_windows_and_chunks_is_that_of_each_response_alone(name: str) -> None:
    """Responses longer than the window and shorter ones; the lengths, not the mask, say where they begin."""
    model = tiny(name, **WINDOWED[name])
    model.set_attn_implementation("sdpa")
    attend_varlen(model)
    assert model.config._attn_implementation == NAME
    ids = torch.randint(37, (26,)).split([9, 1, 3, 13])
    with torch.no_grad():
        alone = [model(input_ids=x[None], use_cache=False).logits for x in ids]
        with unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=sdpa) as attention:
            together = model(**model_inputs(packed(ids)), use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert attention.call_count == 2 * len(ids)
    masked = {(len(query[0, 0]), options["attn_mask"] is not None) for (query, *_), options in _calls(attention)}
    assert {(9, True), (1, False), (3, False), (13, True)} <= masked  # a block only where it says more than "causal"


def _calls(mock: Any) -> list[Any]:
    return [(call.args, call.kwargs) for call in mock.call_args_list]


def test_layers_share_lengths_and_blocks_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once a forward pass, not once a layer: on a GPU each reading waits for all that goes before."""
    model = tiny("gemma3_text", sliding_window=4, num_hidden_layers=6)
    model.set_attn_implementation("sdpa")
    attend_varlen(model)
    seen = []
    blocks = PackedResponses.blocks
    monkeypatch.setattr(PackedResponses, "blocks", lambda self, mask: (seen.append((self, blocks(self, mask))), seen[-1][1])[1])
    model(**model_inputs(packed(torch.randint(37, (20,)).split([9, 11]))), use_cache=False)
    assert len(seen) == 6
    assert len({id(responses) for responses, _ in seen}) == 1
    assert len({id(cut) for _, cut in seen}) == 2  # sliding and full


def test_a_model_that_keeps_lengths_from_its_attention_is_packed_with_a_mask() -> None:
    model = tiny("stablelm", num_key_value_heads=2)
    model.set_attn_implementation("sdpa")
    attend_varlen(model)
    assert model.config._attn_implementation == "sdpa"
    assert attention_width(model) < math.inf  # the collator pads where that is less work
    attach_log_odds_head(model)
    assert packs(model)


def test_sparse_attention_that_goes_by_the_name_of_sdpa_stays_sparse() -> None:
    """DeepSeek-V3.2 selects what a token attends to in the mask for "sdpa", and for other names leaves it to the kernel."""
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
    sparse = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "mlp_layer_types": ["dense"] * 2}
    options = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"num_key_value_heads": 2} | sizes | sparse
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v32", **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(37, (1, 24))
    expected = model(input_ids=ids).logits
    attend_varlen(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_model_whose_packed_responses_see_each_other_is_found_out() -> None:
    model = tiny("llama")
    attach_log_odds_head(model)
    original = model.model.forward

    def with_mask(**kwargs: Any) -> Any:  # a mask of ones keeps transformers from looking at the positions
        ones = torch.ones_like(kwargs["input_ids"])
        return original(**kwargs | {"attention_mask": ones})

    model.model.forward = with_mask
    assert not packs(model)
    model.model.forward = lambda *, position_ids=None, **kwargs: original(**kwargs)
    assert not packs(model)
