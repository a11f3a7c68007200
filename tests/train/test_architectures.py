"""One training step on every kind of causal language model that transformers has: the paper's loss on its own logits.

Tiny random models, and a reference that is not the policy. What the trainer computes (collator, log-odds head, compute_loss;
padded, and packed where it packs) is compared with `bnf_core.reference` in float64 on the logits of the model's own forward
pass, one response at a time. What cannot be trained right is refused in one sentence.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bnf_core import OBJECTIVES, reference, token_log_odds
from bnf_train.config import BNFConfig
from bnf_train.data import Collator, Response, Row, by_prompt
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.model.attention import attend_varlen
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model, load_tokenizer
from bnf_train.model.probe import can_pack, can_share_prompts, switch_off_dropout
from bnf_train.training.trainer import BNFTrainer

VOCAB = 100
# names of sizes in every configuration; one that does not know a name ignores it
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 128},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 48, "ffn_hidden_size": 48},
    # mixtures of experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "intermediate_size_mlp": 48},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # latent, sparse and linear attention
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_topk": 4, "index_n_heads": 16, "index_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    # state spaces
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2},
    **{"mamba_chunk_size": 16, "chunk_size": 16, "state_size": 8},
}
LATENT = {"num_key_value_heads": 4}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


MLLAMA = {  # its text half; images would come through layers that text passes by
    "text_config": {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{
            "cross_attention_layers": [1],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        },
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    }
}


def hybrid(*layers: str) -> dict[str, Any]:
    return {"layer_types": list(layers)}


# a name in AutoConfig, and what it needs beside SIZES (None: a size that it computes itself)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bailing_hybrid": LATENT | hybrid("linear_attention", "full_attention"),
    "bamba": {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 8, **hybrid("sliding_attention", "full_attention")},
    "cohere2_moe": {},
    "ctrl": {"dff": 48},
    "cwm": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, **hybrid("sliding_attention", "full_attention")},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
        **{"activation_sparsity_pattern": [0.0, 0.0], **hybrid("sliding_attention", "full_attention")},
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "max_position_embeddings": 256,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {"sliding_window": 8},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {},
    "granitemoehybrid": hybrid("mamba", "attention"),
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {},
    "lfm2": hybrid("conv", "full_attention"),
    "lfm2_moe": {"num_dense_layers": 1, **hybrid("conv", "full_attention")},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 64, "floor_scale": 512},
    "longcat_flash": LATENT,
    "mamba": {},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": LATENT,
    "minimax": hybrid("linear_attention", "full_attention"),
    "minimax_m2": {},
    "ministral": {"sliding_window": 8},
    "ministral3": {},
    "mllama": MLLAMA,
    "mistral": {"sliding_window": 8},
    "mixtral": {},
    "mixtral with router loss": ROUTER,
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
        **{"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2},
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe with router loss": ROUTER,
    "qwen3_5_text": hybrid("linear_attention", "full_attention"),
    "qwen3_next": hybrid("linear_attention", "full_attention"),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {"v_head_dim": None, "num_heads": 4},
    "youtu": LATENT,
    "zamba": {"num_hidden_layers": 4, **hybrid("mamba", "hybrid", "mamba", "hybrid")},
    "zamba2": {
        "num_hidden_layers": 4,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
        **hybrid("mamba", "hybrid", "mamba", "hybrid"),
    },
}
PADDED = {  # states that run over the whole sequence, positions that are counted in it
    *("bailing_hybrid", "bamba", "bloom", "falcon", "falcon_h1", "falcon_mamba", "gpt_oss", "granitemoehybrid", "jamba"),
    *("lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "openai-gpt", "qwen3_5_text"),
    *("qwen3_next", "recurrent_gemma", "rwkv", "xglm", "xlstm", "zamba", "zamba2"),
}
ALONE = {  # packed, each response with its prompt: attention of their own, lengths that are not handed on, a router's loss
    *("codegen", "deepseek_v32", "doge", "gemma2", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gptj", "nemotron", "opt"),
    *("mixtral with router loss", "qwen3_moe with router loss", "stablelm", "vaultgemma"),
}
LENGTHS = ((40, 4), (9, 3), (33, 20), (2, 1), (21, 5))  # of responses with their prompts, and of prompts


def tiny(name: str, **more: Any) -> PreTrainedModel:
    """A random model; what starts as 0 or 1 (biases, norms) is random, too."""
    options = {k: v for k, v in (SIZES | ARCHITECTURES.get(name, {}) | more).items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **options)).eval()
    return moved(model, 0.02)


@torch.no_grad()
def moved(model: PreTrainedModel, by: float) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.add_(by * torch.randn_like(parameter))
    return model


def some_rows(*lengths: tuple[int, int]) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n, _ in lengths]
    return [Row("", [Response(x, k, i % 2 == 0)]) for i, (x, (_, k)) in enumerate(zip(ids, lengths, strict=True))]


def with_siblings(rows: list[Row]) -> list[Row]:
    """Behind each of the first two rows another response to its prompt."""
    found = []
    for i, row in enumerate(rows):
        (of,) = row.responses
        prompt, own = of.input_ids[: of.prompt_length], of.input_ids[of.prompt_length :]
        found += [row, Row("", [Response(prompt + own[::-1] + own[:1], of.prompt_length, not of.preferred)])][: 1 + (i < 2)]
    return found


def logits_of(model: PreTrainedModel, response: Response) -> tuple[Tensor, Tensor, Any]:
    """(tokens, vocab) logits in float64 of one response alone, its labels, and all that the model gives."""
    ids = torch.tensor([response.input_ids])
    output = model(input_ids=ids, use_cache=False)
    return output.logits[0, response.prompt_length - 1 : -1].double(), ids[0, response.prompt_length :], output


def paper(model: PreTrainedModel, ref: PreTrainedModel, rows: list[Row]) -> Tensor:
    """Eq. 4, in float64; fills in the rows' reference log-odds."""
    losses = []
    for response in (r for row in rows for r in row.responses):
        logits, labels, _ = logits_of(model, response)
        with torch.no_grad():
            ref_logits, _, _ = logits_of(ref, response)
        response.ref_log_odds = token_log_odds(ref_logits, labels)[0].float()
        losses.append(reference.bnf_loss(logits[None], ref_logits[None], labels[None], torch.tensor([response.preferred])))
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BNFConfig:
    folder = tmp_path_factory.mktemp("out")
    options = ("--save_strategy", "no", "--disable_tqdm", "true", "--bf16", "false", "--max_grad_norm", "0")
    return parse(["--model", str(folder), "--dataset", "unused", "--output_dir", str(folder / "out"), *options])


def trainer_of(model: PreTrainedModel, config: BNFConfig) -> BNFTrainer:
    return BNFTrainer(model=model, args=config, objective=OBJECTIVES["bnf"], data_collator=Collator(1))


def check_step(plain: PreTrainedModel, config: BNFConfig, rows: list[Row], router: float = 0.0) -> list[str]:
    """A step's loss and gradient, padded, packed and behind shared prompts, are the paper's; which of these there were."""
    ours, ref = copy.deepcopy(plain), moved(copy.deepcopy(plain), 0.05)
    expected = paper(plain, ref, rows)
    if router:
        padded = Collator(1)(rows)
        expected = expected + router * plain(padded["input_ids"], padded["attention_mask"], use_cache=False).aux_loss
    expected.backward()
    attend_varlen(ours)
    attach_log_odds_head(ours)
    switch_off_dropout(ours)
    packs = can_pack(ours, rows, 8, True, torch.device("cpu"))
    trainer = trainer_of(ours, config)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    whole = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert whole > 1e-3
    shares = packs and can_share_prompts(ours, rows, torch.device("cpu"))
    kinds = {"padded": Collator(1), "packed": Collator(1, True), "shared": Collator(1, True, share_prompts=True)}
    kinds = dict(list(kinds.items())[: 1 + packs + shares])
    for kind, collator in kinds.items():
        batch = collator(rows)
        assert (kind == "padded") == ("attention_mask" in batch)
        assert (kind == "shared" and by_prompt(rows) != [[i] for i in range(len(rows))]) == ("spans" in batch)
        ours.train().zero_grad()
        loss = trainer.compute_loss(ours, batch)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
        loss.backward()
        for name, parameter in ours.named_parameters():
            wanted = theirs.get(name, torch.zeros(()))
            error = (wanted if parameter.grad is None else parameter.grad - wanted).norm()
            assert error <= 2e-3 * wanted.norm() + 1e-4 * whole, f"{name}: off by {error:.2g} of {wanted.norm():.2g}"
    return list(kinds)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_the_papers(name: str, config: BNFConfig) -> None:
    how = check_step(
        tiny(name), config, with_siblings(some_rows(*LENGTHS)), ARCHITECTURES[name].get("router_aux_loss_coef", 0.0)
    )
    assert how == ["padded"] + ["packed"] * (name not in PADDED) + ["shared"] * (name not in PADDED | ALONE)


# --- what depends on more than the response ------------------------------------------------------------------------------

LIMIT = 16


def rope(kind: str) -> dict[str, Any]:
    of_a_kind = {"longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, "dynamic": {"factor": 4.0}}
    limit = {"original_max_position_embeddings" if kind == "longrope" else "max_position_embeddings": LIMIT}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **of_a_kind[kind]}} | limit


SHORT, LONG = ((16, 4), (9, 3), (12, 5)), ((40, 20), (20, 3), (17, 4))


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_longrope_on_one_side_of_its_limit(lengths: tuple[tuple[int, int], ...], config: BNFConfig) -> None:
    model = tiny("phi3", **rope("longrope"))
    assert check_step(model, config, some_rows(*lengths)) == ["padded", "packed", "shared"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
def test_rotary_embeddings_by_the_longest_response_are_refused_on_both_sides(name: str, kind: str, packing: bool) -> None:
    """However few of the rows are on one of them: the shortest and the longest are always tried together."""
    model = tiny(name, **rope(kind))
    attach_log_odds_head(model)
    rows = some_rows(*[(40, 20)] * 9, (5, 2), *[(40, 20)] * 9)
    with pytest.raises(UsageError, match=rf"{kind} rotary.* 5 to 40 tokens, .* limit of 16; pass --max_length 16\."):
        can_pack(model, rows, 2, packing, torch.device("cpu"))
    assert can_pack(model, some_rows(*SHORT), 2, packing, torch.device("cpu")) == packing


def test_positions_counted_over_the_pack_are_found_at_the_length_of_the_data(config: BNFConfig) -> None:
    """Llama-4 scales attention by the place in the sequence, from `floor_scale` tokens on: packs reach it, responses do not."""
    model = tiny("llama4_text", floor_scale=48, attn_scale=1.0, no_rope_layers=[1, 0])
    rows = some_rows(*LENGTHS)
    assert check_step(model, config, rows) == ["padded"]
    attach_log_odds_head(model)
    assert not can_pack(model, rows, 5, True, torch.device("cpu"))
    assert can_pack(model, some_rows(*SHORT), 3, True, torch.device("cpu"))  # 37 tokens


def test_a_window_beyond_the_first_tokens_packs(config: BNFConfig) -> None:
    """Responses on both sides of a sliding window and of an attention chunk."""
    for name, window in (("mistral", {"sliding_window": 12}), ("llama4_text", {"attention_chunk_size": 12})):
        how = check_step(tiny(name, **window), config, with_siblings(some_rows(*LENGTHS)))
        assert how == ["padded", "packed"] + ["shared"] * (name == "mistral")  # its attention is told of its window


def beside_another_reference(name: str, **more: Any) -> tuple[PreTrainedModel, list[Row]]:
    """A model with the log-odds head, and rows whose reference is another model."""
    model, rows = tiny(name, **more), some_rows(*LENGTHS)
    paper(model, moved(copy.deepcopy(model), 0.05), rows)
    attach_log_odds_head(model)
    return model, rows


# --- training and evaluation mode ----------------------------------------------------------------------------------------


def test_dropout_is_switched_off_and_named(config: BNFConfig) -> None:
    """With a reference that is another model, so that no w = 1 would tell."""
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    check_step(model, config, some_rows(*LENGTHS))
    assert switch_off_dropout(model) == ["dropout"]
    assert switch_off_dropout(model) == []
    assert model.config.resid_pdrop == 0.3  # what is saved stays
    assert switch_off_dropout(tiny("mixtral", router_jitter_noise=0.1, attention_dropout=0.1)) == [
        "attention_dropout",
        "jitter_noise",
    ]


@pytest.mark.parametrize(
    ("name", "message"), [("gpt2", "look for dropout"), ("phimoe", "routers in its code"), ("llama", "differ")]
)
def test_a_policy_that_is_another_function_in_training_mode_is_refused(name: str, message: str, config: BNFConfig) -> None:
    model, rows = beside_another_reference(name, router_jitter_noise=0.5)  # PhiMoE draws among experts that are this close
    if name != "gpt2":
        switch_off_dropout(model)
    trainer = trainer_of(model, config)
    if name == "llama":
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output + torch.rand_like(output) if module.training else None
        )
    with pytest.raises(UsageError, match=message):
        trainer.compute_loss(model.train(), Collator(1)(rows))


def test_a_policy_that_is_not_its_reference_is_refused(config: BNFConfig) -> None:
    model, rows = beside_another_reference("llama")
    starts = {"starts_at_reference": True, "data_collator": Collator(1)}
    trainer = BNFTrainer(model=model, args=config, objective=OBJECTIVES["bnf"], **starts)
    with pytest.raises(UsageError, match="policy and reference are not the same model"):
        trainer.compute_loss(model.train(), Collator(1)(rows))


def test_the_check_draws_no_random_numbers_and_is_made_once(config: BNFConfig) -> None:
    model, rows = beside_another_reference("llama")
    trainer, calls = trainer_of(model, config), []
    model.register_forward_hook(lambda *_: calls.append(torch.rand(1)))
    before = torch.get_rng_state()
    for expected in (3, 4):
        trainer.compute_loss(model.train(), Collator(1)(rows))
        assert len(calls) == expected
        torch.set_rng_state(before)
    assert model.training


def test_what_evaluation_does_to_weights_is_not_saved(tmp_path: Path) -> None:
    """RWKV halves weights of its later layers in place, for fp16."""
    model = tiny("rwkv", attention_hidden_size=32, rescale_every=1)
    before = {name: p.clone() for name, p in model.train().named_parameters()}
    expected = model(input_ids=torch.arange(9)[None], use_cache=False).logits
    attach_log_odds_head(model)
    logits = model.eval()(input_ids=torch.arange(9)[None], use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.rescale_every == 1
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, before[name]), name


# --- mixtures of experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["bnf", "kto"])
def test_the_router_loss_of_a_step_is_the_mean_over_its_responses(objective: str, config: BNFConfig) -> None:
    """In one pass through the head and in two: micro-batches of 1 and 4 responses weigh 1 and 4."""
    model = tiny("mixtral with router loss")
    rows = some_rows(*LENGTHS)
    paper(model, moved(copy.deepcopy(model), 0.05), rows)
    attach_log_odds_head(model)
    with_router = BNFTrainer(model=model, args=config, objective=OBJECTIVES[objective], data_collator=Collator(1))
    total = expected = 0.0
    for part in (rows[:1], rows[1:]):
        batch = Collator(1)(part)
        found = []
        for with_router.router_loss in (0.5, 0.0):
            found.append(with_router.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(5)).item())
        aux = model(batch["input_ids"], batch["attention_mask"], use_cache=False).aux_loss.item()
        total += found[0] - found[1]
        expected += 0.5 * aux * len(part) / 5
    assert total == pytest.approx(expected, rel=1e-4)


def test_a_router_loss_that_the_model_does_not_compute_is_refused(config: BNFConfig) -> None:
    model = tiny("llama4_text", **ROUTER)
    rows = some_rows(*LENGTHS)
    paper(model, model, rows)
    attach_log_odds_head(model)
    with pytest.raises(UsageError, match="set output_router_logits to false"):
        trainer_of(model, config).compute_loss(model.train(), Collator(1)(rows))


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert", "bert-generation", "camembert", "electra", "ernie", "rembert", "roberta", "roformer", "xlm"]
)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(name: str) -> None:
    """An encoder with a language-model head: without is_decoder in its configuration it looks ahead."""
    with pytest.raises(UsageError, match="depend on the tokens behind it; expected a causal language model"):
        attach_log_odds_head(tiny(name, embedding_size=32))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UsageError, match="it is an adapter, not a whole model; merge it"):
            load(str(tmp_path))
