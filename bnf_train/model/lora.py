"""LoRA and QLoRA through peft: the frozen base is the reference, only the adapter is trained and saved, or merged later."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.model.head import give_log_odds
from bnf_train.model.load import load_model


def quantization(config: BNFConfig) -> Any:
    """What `load_model` takes for --load_in_4bit: 4-bit NormalFloat weights, multiplied in bf16; else None.

    Raises:
      UsageError: --load_in_4bit without --use_peft, without a GPU or without bitsandbytes.
    """
    if not config.load_in_4bit:
        return None
    if not config.use_peft:
        raise UsageError(
            "--load_in_4bit: weights of 4 bits cannot be trained themselves; add --use_peft true, or leave it out."
        )
    if not torch.cuda.is_available():
        raise UsageError("--load_in_4bit: bitsandbytes' kernels need a CUDA GPU and none was found; leave it out.")
    if not is_bitsandbytes_available():
        raise UsageError("--load_in_4bit: needs bitsandbytes (pip install bitsandbytes), or leave it out.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # FSDP2 shards floating-point storage only
    )


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
    targets = config.lora_target_modules or ["all-linear"]
    try:
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type=peft.TaskType.CAUSAL_LM,
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets,
                modules_to_save=sorted(whole) or None,
                ensure_weight_tying=tied and bool(whole & embeddings),
            ),
        )
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {' '.join(targets)}: {' '.join(str(error).split())}") from error
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
