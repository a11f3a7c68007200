"""Steps of a model of Llama-3-8B's shape, as a share of what the device's matrix products reach."""

import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bnf_core import bnf, objective_spec
from bnf_train.benchmark.task import figures, this_device, wait
from bnf_train.config import bf16_in_hardware
from bnf_train.data import model_inputs, packed
from bnf_train.model.attention import attend_varlen
from bnf_train.model.head import attach_log_odds_head

LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip


def mfu(layers: int, tokens: int, lora: bool, steps: int, config: dict[str, Any] | None = None) -> dict[str, float]:
    """Steps on one packed batch of 8 responses with a model of Llama-3-8B's shape and `layers` layers.

    operations of a step = (6 full, or 4 with a frozen base) x weights that multiply a token x tokens, and the same
    multiple of a layer's 2 d sum over responses of length^2 for causal attention: what the model needs, whatever is recomputed.
    """
    device = this_device()
    dtype = torch.bfloat16 if bf16_in_hardware(device.type == "cpu") else torch.float32
    shape = LlamaConfig(**(LLAMA_3_8B | {"num_hidden_layers": layers} | (config or {})), attn_implementation="sdpa")
    with device:
        torch.set_default_dtype(dtype if lora else torch.float32)
        model = LlamaForCausalLM(shape)
        torch.set_default_dtype(torch.float32)
    attend_varlen(model)
    attach_log_odds_head(model)
    embedded = model.get_input_embeddings().weight.numel()
    multiplying = sum(p.numel() for p in model.parameters()) - (0 if shape.tie_word_embeddings else embedded)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    length = tokens // 8
    ids = torch.randint(shape.vocab_size, (1, 8 * length), device=device)
    places = torch.arange(8 * length, device=device).view(8, length)[:, :-1].flatten()
    each = torch.ones(len(places), device=device)
    inputs = model_inputs(packed(ids[0].split(length))) | {
        "response_positions": places, "response_labels": ids[0, places + 1],
        "token_loss": objective_spec(bnf).weighted_token_loss,
        "per_token": (torch.ones_like(each), each / len(places), torch.zeros_like(each)),  # sign, weight, ref_log_odds
    }  # fmt: skip
    times = []
    for _ in range(steps + 2):
        wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, *_ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        times.append(time.perf_counter() - start)
    attention = layers * 2 * shape.hidden_size * 8 * length**2
    operations = (4 if lora else 6) * (multiplying * 8 * length + attention / 2)
    achieved, peak = operations / median(times[2:]), _peak_operations(device, dtype)
    return figures(8 * length, median(times[2:])) | {
        "tera_operations_per_second": achieved / 1e12, "peak_of_products": peak / 1e12, "mfu": achieved / peak,
        "bits": torch.finfo(dtype).bits,
    }  # fmt: skip


def _peak_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of matrix products, the best of some."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
