"""LoRA and QLoRA through peft: the frozen base is the reference, only the adapter is trained and saved, or merged later."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from bnf_train.config import BNFConfig, json_object
from bnf_train.errors import UsageError, is_out_of_memory, nearest, one_line
from bnf_train.model.head import give_log_odds
from bnf_train.model.load import load_model


def quantization(config: BNFConfig) -> Any:
    """What `load_model` takes for --load_in_4bit: 4-bit NormalFloat weights, multiplied in bf16 under --bf16, else in float32.

    Raises:
      UsageError: --load_in_4bit without --use_peft, or without a bitsandbytes that can do it here.
    """
    if not config.load_in_4bit:
        return None
    if not config.use_peft:
        raise UsageError(
            "--load_in_4bit: weights of 4 bits cannot be trained themselves; add --use_peft true, or leave it out."
        )
    if not is_bitsandbytes_available():
        raise UsageError("--load_in_4bit: needs bitsandbytes (pip install bitsandbytes), or leave it out.")
    try:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else torch.float32,
            bnb_4bit_quant_storage=torch.bfloat16 if torch.cuda.is_available() else torch.uint8,  # FSDP2 shards floats only
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(f"--load_in_4bit: {one_line(error)}; leave it out.") from error


def lora_config(config: BNFConfig) -> peft.LoraConfig:
    """peft's, of the flags: those with a name of their own, and --lora_kwargs.

    Raises:
      UsageError: --lora_kwargs that peft has no such option for, or a start that is not the reference.
    """
    own = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    own |= {"target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save", "task_type": "use_peft"}
    kwargs = json_object("lora_kwargs", config.lora_kwargs, '{"use_dora": true}')
    known = {field.name for field in fields(peft.LoraConfig)}
    for key, value in kwargs.items():
        if key in own:
            raise UsageError(f"--lora_kwargs: {key} is --{own[key]}; leave it out there.")
        if key not in known:
            raise UsageError(f"--lora_kwargs: peft's LoraConfig has no {key}{nearest(key, known)}.")
        if key == "init_lora_weights" and value not in (True, "gaussian", "orthogonal"):
            raise UsageError(
                f"--lora_kwargs: init_lora_weights {value}: the adapter would not begin as the reference; expected true, "
                '"gaussian" or "orthogonal".'
            )
    targets = config.lora_target_modules or ["all-linear"]  # a name, or a pattern, which peft takes alone
    try:
        return peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets[0] if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]) else targets,
            modules_to_save=config.lora_modules_to_save,
            **kwargs,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"--lora_kwargs {config.lora_kwargs}: {one_line(error)}.") from error


def check_modules(model: PreTrainedModel, config: BNFConfig) -> None:
    """Every module that a flag names is there: peft passes over names that match nothing, as long as one does.

    Raises:
      UsageError: names the flag and the module.
    """
    if not config.use_peft:
        return
    names = [name for name, _ in model.named_modules() if name]
    last = {name.rpartition(".")[2] for name in names}
    for flag in ("lora_target_modules", "lora_modules_to_save"):
        for wanted in getattr(config, flag) or []:
            named = any(f".{name}".endswith(f".{wanted}") for name in names)
            if not named and wanted != "all-linear" and not (flag == "lora_target_modules" and _matches(wanted, names)):
                raise UsageError(f"--{flag} {wanted}: {type(model).__name__} has no such module{nearest(wanted, last)}.")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a regular expression is the whole of any name."""
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def add_lora(model: PreTrainedModel, config: BNFConfig) -> Any:
    """`model`, which has the log-odds head, with a LoRA adapter around it where --use_peft asks for one.

    W + (alpha / r) B A with B = 0 at the start: the policy begins as exactly the reference. The head stays frozen, which
    costs two matrix products in place of three, unless --lora_modules_to_save names it: then a copy of it is trained
    whole. Where embeddings are tied, the copy is the embeddings' too.

    Raises:
      UsageError: flags that peft does not take, or a low-rank step of the head or of tied embeddings.
    """
    if not config.use_peft:
        return model
    whole = set(config.lora_modules_to_save or ())
    tied = _tied(model)
    embeddings = {n.split(".")[-1] for n, m in model.named_modules() if m in _embeddings(model)}
    if tied and whole & embeddings:
        # peft ties the head to the copy of the input embeddings, and by that name only
        head, embed = (_name(model, m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
        whole = (whole - {head}) | {embed}
    if config.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(config.gradient_checkpointing))
    check_modules(model, config)
    options = lora_config(config)
    options.modules_to_save = sorted(whole) or None
    options.ensure_weight_tying = tied and bool(whole & embeddings)
    targets = config.lora_target_modules or ["all-linear"]
    try:
        wrapped = peft.get_peft_model(model, options)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}.") from error
    head = model.get_output_embeddings()
    if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        raise UsageError(
            f"--lora_target_modules {' '.join(targets)}: a low-rank step of the head would make its whole weight anew "
            "in every forward pass; name the head in --lora_modules_to_save instead, which trains all of it."
        )
    if tied and isinstance(model.get_input_embeddings(), peft.tuners.tuners_utils.BaseTunerLayer):
        raise UsageError(
            f"--lora_target_modules {' '.join(targets)}: this model's head is its input embeddings, and a low-rank step of "
            "one of them unties them; name them in --lora_modules_to_save instead, which trains both as one."
        )
    for copy in getattr(head, "modules_to_save", {}).values():  # of a tied head peft makes a new layer
        give_log_odds(copy, model)
    return wrapped


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _tied(model: PreTrainedModel) -> bool:
    embed, head = _embeddings(model)
    return head.weight is embed.weight


def _name(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name.split(".")[-1] for name, m in model.named_modules() if m is module)


# --- adapters that were saved -----------------------------------------------------------------------------------------


def load_merged(name: str, flag: str, trust_remote_code: bool = False) -> Any:
    """A model folder, a hub name, or a folder of a LoRA adapter, which is merged into its base model.

    Raises:
      UsageError: as `load_model`, under the name of `flag`.
    """
    base = base_of(name, flag)
    with errors_about(flag, name, base):
        model: Any = load_model(base, trust_remote_code)
    if base == name:
        return model
    if not (Path(name) / "adapter_model.safetensors").is_file():
        raise UsageError(f"{flag} {name}: expected the adapter's weights in adapter_model.safetensors, found none.")
    try:
        return peft.PeftModel.from_pretrained(model, name).merge_and_unload()
    except Exception as error:  # peft and safetensors raise a dozen unrelated types
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{flag} {name}: the adapter does not fit {base} ({one_line(error, 200)}).") from error


def base_of(name: str, flag: str) -> str:
    """The model that an adapter belongs to, from its adapter_config.json; any other name is its own."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return name
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise UsageError(f"{flag} {name}: its adapter_config.json names no base_model_name_or_path; put the base model there.")
    return base


@contextmanager
def errors_about(flag: str, name: str, base: str | None = None) -> Iterator[None]:
    """Errors under the flag that they are about: what loads models and data knows them as --model and --dataset."""
    try:
        yield
    except UsageError as error:
        about = "" if base in (None, name) else f"{flag} {name} is an adapter, and its base model: "
        raise UsageError(about + str(error).replace("--model", flag).replace("--dataset", "--data")) from error
