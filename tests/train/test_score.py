"""The loop of scoring and the loop of generation: the same for any batches, and nothing of the model is left changed."""

import doctest
import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bnf_core import token_log_odds
from bnf_train.data import Collator, Response, collate
from bnf_train.model.attention import NAME, attend_varlen
from bnf_train.model.generate import generate
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.score import longest_first, score
from bnf_train.training.distributed import compile_layers

CPU = torch.device("cpu")
VOCAB = 48


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes | {"vocab_size": VOCAB, "initializer_range": 0.3} | options))
    return model


def some_responses(count: int = 7) -> list[Response]:
    draw = random.Random(0)
    lengths = [(draw.randint(1, 9), draw.randint(1, 20)) for _ in range(count)]
    return [Response([draw.randrange(VOCAB) for _ in range(p + n)], p, True) for p, n in lengths]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_scores_are_those_of_each_responses_own_logits(packed: bool, batch_size: int) -> None:
    model, responses = tiny(attn_implementation="sdpa").train(), some_responses()
    attend_varlen(model)
    attach_log_odds_head(model)
    batches = [responses[start : start + batch_size] for start in range(0, len(responses), batch_size)]
    sizes: list[int] = []
    scored = score(model, batches, Collator(0, packed), CPU, logits=True, done=lambda batch: sizes.append(len(batch)))
    assert sizes == [len(batch) for batch in batches]
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks
    for response, found in zip(responses, scored, strict=True):
        ids = torch.tensor([response.input_ids])
        with torch.no_grad():
            full = model(input_ids=ids[:, :-1]).logits
        log_odds, entropy = (x[0, response.prompt_length - 1 :] for x in token_log_odds(full, ids[:, 1:]))
        logits = full.gather(2, ids[:, 1:, None])[0, response.prompt_length - 1 :, 0]
        torch.testing.assert_close(found.log_odds, log_odds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-4)
        assert found.logits is not None
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
        assert found.argmax_mass is not None
        mass = full.softmax(-1).amax(-1)[0, response.prompt_length - 1 :]
        torch.testing.assert_close(found.argmax_mass, mass, rtol=1e-4, atol=1e-5)
        assert not found.log_odds.requires_grad


def test_the_mode_is_restored_where_a_forward_pass_fails() -> None:
    model = tiny().train()
    attach_log_odds_head(model)
    with pytest.raises(IndexError):
        score(model, [[Response([VOCAB, 1, 2], 1, True)]], Collator(0), CPU, logits=True)  # no such token
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_compiled_layers_are_not_compiled_anew_for_other_lengths() -> None:
    model, responses = tiny(attn_implementation="sdpa"), some_responses(9)
    attend_varlen(model)
    assert model.config._attn_implementation == NAME
    attach_log_odds_head(model)
    batches, collator = [responses[:2], responses[2:5], responses[5:]], Collator(0, packed=True)
    expected = score(model, batches, collator, CPU)
    compile_layers(model, "eager", None)
    score(model, batches[:1], collator, CPU)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = score(model, batches, collator, CPU)
    for found, plain in zip(again, expected, strict=True):
        torch.testing.assert_close(found.log_odds, plain.log_odds, rtol=1e-4, atol=1e-4)


def test_generation_is_the_same_in_any_batches_and_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model, draw = tiny(vocab_size=len(tokenizer), max_position_embeddings=64).train(), random.Random(0)
    own = model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, eos_token_id=[3, 4])
    prompts = [[draw.randrange(200) for _ in range(n)] for n in (5, 1, 9, 3)]
    alone = generate(model, tokenizer, prompts, CPU, max_new_tokens=8, batch_size=1)
    assert alone == generate(model, tokenizer, prompts, CPU, max_new_tokens=8, batch_size=3)
    assert all(answer.cut == (answer.tokens[-1] not in {3, 4, tokenizer.eos_token_id}) for answer in alone)
    assert model.training
    assert model.generation_config is own
    ids = torch.tensor([prompts[0]])
    for token in alone[0].tokens:
        with torch.no_grad():
            assert int(model.eval()(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_seed_draws_the_same_again_and_leaves_the_state_alone(tokenizer: Any) -> None:
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=64)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    state = torch.get_rng_state()
    first, again, other = (generate(model, tokenizer, [[1, 2]], CPU, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    likely = generate(model, tokenizer, [[1, 2]], CPU, seed=0, top_p=1e-6, **options)  # the most likely token alone is left
    assert likely == generate(model, tokenizer, [[1, 2]], CPU, max_new_tokens=12)


def test_longest_first() -> None:
    assert longest_first([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert longest_first([], 2) == []
    assert longest_first([3, 9, 1, 5, 8], 2, ["a", "b", "c", "a", "b"]) == [[1, 4], [3, 0], [2]]
    assert longest_first([3, 9, 1, 5], 2, ["a", "c", "c", "b"]) == [[1, 2], [3, 0]]


def test_the_worked_batch() -> None:
    assert doctest.testmod(collate).failed == 0
    assert doctest.testmod(collate).attempted > 0
