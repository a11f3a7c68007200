"""Parameters of a model, counted on tensors without memory."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bnf_train.errors import UsageError
from bnf_train.model.attention import attend_varlen
from bnf_train.model.load import from_model


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a causal language model, counted on tensors without memory."""

    total: int  # a tied head is counted once
    embedding: int
    head: int  # vocab * dim, also where it is the embedding
    vocab: int
    tied: bool
    backbone_linear: int  # weights of the backbone's matrix products: what autocast copies, what 6 N counts
    largest_layer: int  # what is gathered at a time where weights are sharded
    layers: int
    attention_width: int  # heads * head_dim
    lora: int  # parameters of adapters on every matrix product of the backbone


def build(name: str, trust_remote_code: bool, dtype: str = "float32") -> PreTrainedModel:
    """The model of a folder's or hub name's config.json, on tensors without memory.

    Raises:
      UsageError: no such folder, the hub cannot be reached, or the configuration is of no causal language model.
    """

    try:
        config = from_model(name, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    except UsageError as error:
        if Path(name).exists():
            raise
        raise UsageError(f"{str(error)[:-1]}; for a plan a folder with its config.json and --rows are enough.") from error
    kwargs = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    with FakeTensorMode():
        model: PreTrainedModel = from_model(name, lambda *_, **__: AutoModelForCausalLM.from_config(config, **kwargs))
        attend_varlen(model)
    return model


def size_of(model: PreTrainedModel, lora_rank: int) -> ModelSize:
    """LoRA adapters: rank * (inputs + outputs) for every matrix of the backbone."""
    config: Any = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    linear = [p for n, p in model.base_model.named_parameters() if p.dim() >= 2 and p is not embedding and p is not head]
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    largest = max((_count(layer.parameters()) for stack in stacks for layer in stack), default=_count(linear))
    heads = config.num_attention_heads
    return ModelSize(
        total=_count(model.parameters()),
        embedding=embedding.numel(),
        head=head.numel(),
        vocab=len(head),
        tied=head is embedding,
        backbone_linear=_count(linear),
        largest_layer=largest,
        layers=config.num_hidden_layers,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        lora=sum(lora_rank * (p.shape[-1] + p.shape[-2]) * math.prod(p.shape[:-2]) for p in linear),
    )


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
