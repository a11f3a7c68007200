"""LoRA and QLoRA through peft: the frozen base is the reference, and only the adapter is trained and saved."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError
from bnf_train.model.head import give_log_odds


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
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

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
    import peft

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
