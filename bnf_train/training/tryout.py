"""Optimizer, schedule, trackers and the like, tried on a tiny model: what is missing is said before anything is read."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from bnf_train import hub
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError, nearest, one_line
from bnf_train.model.lora import lora_config, quantization
from bnf_train.training import distributed, metrics

PROBES = ("0.125", "3", "true", "false", "bfloat16", "AUTO")  # an argument that any of these changes nothing of has no effect


WHAT = ("params", "model", "optimizer_dict")  # keys under which transformers says what an optimizer is of


def try_out(config: BNFConfig) -> None:
    """Makes one of everything that a flag names, and takes an optimizer step.

    Raises:
      UsageError: a package is missing, an argument unknown, missing or without effect; the flag is named.
    """
    with _about("--fsdp, or the launcher's variables"):
        asked = distributed.asked(config)
    distributed.check(*asked)
    with _about(_flag(config, "optim") + _flag(config, "optim_args")):
        optimizer = _optimizer(config)
    with _about(_flag(config, "lr_scheduler_type") + _flag(config, "lr_scheduler_kwargs")):
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, config.lr_scheduler_kwargs or {})
    for name in config.report_to or []:
        with _about(f"--report_to {name}"):
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
    if config.torch_compile:
        with _about(_flag(config, "torch_compile_backend") + _flag(config, "torch_compile_mode")):
            torch.compile(nn.Identity(), backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    if config.gradient_checkpointing and config.gradient_checkpointing_kwargs:
        kwargs = {"use_reentrant": False} | dict(config.gradient_checkpointing_kwargs)
        kwargs.pop("every_n_layers", None)  # of transformers, not of torch
        with _about(_flag(config, "gradient_checkpointing_kwargs")):
            checkpoint(nn.Identity(), torch.zeros(1, requires_grad=True), **kwargs)
    if config.use_peft:
        lora_config(config)
    quantization(config)
    if config.push_to_hub:
        _can_push(config)
    _best_metric(config)


def _optimizer(config: BNFConfig) -> torch.optim.Optimizer:
    tiny = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    state = torch.random.get_rng_state()
    model = LlamaForCausalLM(tiny).to(config.device)
    torch.random.set_rng_state(state)
    kind, kwargs = _kind_and_kwargs(config, model)
    _arguments_have_effect(config, model)
    if config.optim_target_modules and "params" not in kwargs:
        raise ValueError("--optim_target_modules is for GaLore's and APOLLO's optimizers; leave it out")
    what: Any = next((kwargs.pop(name) for name in WHAT if name in kwargs), model.parameters())
    factory = not isinstance(kind, type)  # as transformers has it: called without arguments, then with the model
    optimizer: torch.optim.Optimizer = kind()(model, **kwargs) if factory else kind(what, **kwargs)
    if not hasattr(optimizer, "fused_backward"):  # LOMO's step is its backward pass
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=config.device)).logits.sum().backward()
        optimizer.step()
    return optimizer


def _kind_and_kwargs(config: BNFConfig, model: nn.Module, **other: Any) -> tuple[Any, dict[str, Any]]:
    args: Any = copy.copy(config)
    args.optim_target_modules = config.optim_target_modules and "all-linear"  # the tiny model has other names
    args.__dict__ |= other
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind, dict(kwargs)


def _arguments_have_effect(config: BNFConfig, model: nn.Module) -> None:
    """transformers picks the arguments that it knows of an optimizer, and drops the others without a word."""
    given = [part.partition("=") for part in (config.optim_args or "").replace(" ", "").split(",") if part]
    for name, _, value in given:
        rest = [f"{n}={v}" for n, _, v in given if n != name]
        without = _shown(_kind_and_kwargs(config, model, optim_args=",".join(rest)))
        if not any(_changes(config, model, [*rest, f"{name}={probe}"], without) for probe in (value, *PROBES)):
            raise ValueError(f"{name}={value} has no effect on this optimizer; leave it out")


def _changes(config: BNFConfig, model: nn.Module, arguments: list[str], without: str) -> bool:
    try:
        return _shown(_kind_and_kwargs(config, model, optim_args=",".join(arguments))) != without
    except Exception:  # a value that it cannot read, of an argument that it does read
        return True


def _shown(kind_and_kwargs: tuple[Any, dict[str, Any]]) -> str:
    kind, kwargs = kind_and_kwargs
    return f"{kind} {[(k, v) for k, v in kwargs.items() if k not in WHAT]} {kwargs.get('params', '')}"


def _can_push(config: BNFConfig) -> None:
    if not hub.reachable():
        raise UsageError("--push_to_hub: the Hugging Face hub cannot be reached; leave it out, and upload --output_dir later.")
    with _about("--push_to_hub"):
        huggingface_hub.whoami(config.hub_token)


def _best_metric(config: BNFConfig) -> None:
    """--metric_for_best_model is one that an evaluation computes."""
    name = config.metric_for_best_model
    known = {m.key(label) for m in metrics.METRICS if m.held_out for label in m.labels}
    if name is not None and name.removeprefix(metrics.EVAL) not in known:
        raise UsageError(
            f"--metric_for_best_model {name}: no metric of an evaluation{nearest(name, known)}; there are "
            f"{', '.join(sorted(known))}."
        )


def _flag(config: BNFConfig, name: str) -> str:
    """Flag and value as the user may have written them; nothing where there is no value."""
    value = getattr(config, name)
    return f" --{name} {getattr(value, 'value', value)}" if value else ""


@contextmanager
def _about(flags: str) -> Iterator[None]:
    """What a library refuses as one sentence about `flags`."""
    try:
        yield
    except Exception as error:  # libraries raise a dozen unrelated types here
        raise UsageError(f"{flags.strip()}: {one_line(error, 300)}.") from error
