"""The embedded default is what its README says."""

from collections import Counter

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train import demo
from bnf_train.data import Counts, read_rows, tokenize


def test_model_and_tokenizer_are_small_and_complete() -> None:
    weights = demo.MODEL / "model.safetensors"
    assert weights.stat().st_size <= 6_000_000
    with safe_open(weights, "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(demo.MODEL)
    assert model.num_parameters() == 2_828_736
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ann has 3 apples and buys 4 more. How many apples does she have?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**prompt, max_new_tokens=120, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(answer)
    assert "apples" in text
    assert "A: " in text
    assert text.endswith("<|im_end|>")  # it ends its turn


def test_preferences_are_400_rows_that_fit() -> None:
    rows = read_rows(str(demo.PREFERENCES))
    assert Counter(row["label"] for row in rows) == {True: 200, False: 200}
    assert len({(row["prompt"], row["completion"]) for row in rows}) == 400
    kept, counts = tokenize(rows, AutoTokenizer.from_pretrained(demo.MODEL), 320, "demo")
    assert counts == Counts(rows=400)
    assert len(kept) == 400
