"""What torch.compile, DDP, FSDP2 and DeepSpeed ZeRO-3 need so that a run with them computes what it would without.

The head's weight needs nothing here: it is used inside the head's own forward, where both have gathered it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainingArguments

from bnf_train.errors import UsageError
from bnf_train.training.quantities import Responses

DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def load_in_float32(config: TrainingArguments) -> None:
    """Under ZeRO-3 weights are split, and rounded to what the plugin says, while they are loaded: call it before that.

    It is to say nothing: float32 against --bf16 would be a contradiction to transformers.
    """
    plugin = config.deepspeed_plugin
    if plugin is not None and config.bf16:
        plugin.deepspeed_config.pop("bf16", None)
        plugin.set_deepspeed_weakref()  # a copy, which transformers reads when it loads a model


def asked(config: TrainingArguments) -> tuple[ParallelismConfig | None, FullyShardedDataParallelPlugin | None]:
    """What the flags, or else the launcher's variables, say of parallelism and FSDP; as an Accelerator reads them."""
    parallelism, plugin = config.parallelism_config, None
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        parallelism = ParallelismConfig()
    if config.fsdp_plugin_args is not None:
        plugin = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args)
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
    return parallelism, plugin


def check(parallelism: ParallelismConfig | None, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raises UsageError for sharding that would leave no model folder at the end, and for sequences that are split up."""
    for name in ("cp_size", "sp_size", "tp_size"):
        if parallelism is not None and (size := getattr(parallelism, name)) > 1:
            raise UsageError(
                f"{name} {size}: each process needs the whole sequence of a response, packed or padded, and the whole head; "
                "leave it out, and for long responses use FSDP2 with --gradient_checkpointing."
            )
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise UsageError(
            f"fsdp_version {plugin.fsdp_version}: only FSDP2 is supported; set fsdp_version: 2 in the launcher's file."
        )
    if "FULL" not in str(plugin.state_dict_type):
        raise UsageError(
            f"fsdp_state_dict_type {plugin.state_dict_type.name}: no model folder would be saved at the end; set "
            "fsdp_state_dict_type: FULL_STATE_DICT in the launcher's file (checkpoints are read by any number of processes)."
        )


def keep_float32(accelerator: Accelerator) -> None:
    """bf16 means autocast over float32 weights, sharded or not; call it before `accelerator.prepare`.

    Accelerate's own choice under FSDP2 and bf16 rounds what goes into and comes out of the model (log-odds to 3 digits)
    and adds gradients up in bf16; DeepSpeed's rounds the weights. Here both gather float32 and leave bf16 to autocast,
    so that the policy starts as exactly the reference (w = 1).
    """
    if accelerator.mixed_precision != "bf16":
        return
    fsdp, deepspeed = (getattr(accelerator.state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    if fsdp is not None and fsdp.fsdp_version == 2:
        fsdp.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if deepspeed is not None:
        deepspeed.deepspeed_config["bf16"] = {"enabled": False}
        # no modules whose weights and gradients would be gathered and added up in bf16
        in_float32: dict[str, Any] = {"lower_precision_safe_modules": []}
        deepspeed.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"} | in_float32


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """bf16 autocast for FSDP2, where Accelerate leaves it out: elsewhere it wraps the model's forward in it itself."""
    if not accelerator.is_fsdp2 or accelerator.mixed_precision != "bf16":
        return nullcontext()
    # no cache: bf16 copies of layers would outlive the layers' own weights, which FSDP2 frees
    return torch.autocast(accelerator.device.type, torch.bfloat16, cache_enabled=False)


def wait_for_every_gradient(accelerator: Accelerator, model: nn.Module) -> None:
    """Under DDP, search each step's graph for weights without a gradient only where the model has such.

    transformers has the search always on, which costs a walk over the graph a step and PyTorch's warning.
    """
    if accelerator.distributed_type in DDP and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = bool(unreached(model))


def unreached(model: nn.Module) -> list[str]:
    """Names of trained weights that log-odds of text do not depend on: a vision tower, an expert that no token went to.

    Looked for as DDP does, in the graph of a forward pass: of a few tokens, in evaluation mode, no gradient computed.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)
    training = model.training
    with torch.enable_grad():
        log_odds, _ = model.eval()(
            input_ids=ids.unsqueeze(0), response_positions=torch.arange(7, device=device), response_labels=ids[1:]
        )
    model.train(training)
    reached, seen, nodes = set(), set(), [log_odds.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))  # of the nodes that add up a weight's gradient
            nodes += [before for before, _ in node.next_functions]
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


def without_tied(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered state dict without the second name of a weight with two, which one process does not save either."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}


def whole_state(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """An optimizer's state dict with what FSDP2 has sharded gathered on the CPU, as one process has it.

    Every process calls it; where `keep` is false, the gathered tensors are dropped.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if keep else None

    moments = {index: {name: gather(v) for name, v in of.items()} for index, of in state["state"].items()}
    return state | {"state": moments}


def sharded_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """What `whole_state` gathered, each process its shard, as the optimizer's parameters are sharded now, or are not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(value: Any, parameter: Tensor) -> Any:
        # the same shape: a moment; the number of steps has none
        return _shard_like(parameter, value) if getattr(value, "shape", None) == parameter.shape else value

    moments = {index: {name: shard(v, parameters[index]) for name, v in of.items()} for index, of in state["state"].items()}
    return state | {"state": moments}


def load_weights(model: nn.Module, folder: Path) -> None:
    """A model's weights, or an adapter's, from the folder that a trainer saved, each process its shard.

    Raises:
      FileNotFoundError: this process sees none in the folder.
    """
    weights = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    paths = list(folder.glob("*model*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no weights")
    for path in paths:
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                weights[name].copy_(_shard_like(weights[name], file.get_tensor(name)))


def _shard_like(like: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, which every process has."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def with_all_tokens(of: Responses, accelerator: Accelerator) -> Responses:
    """The values of every process's tokens in each of them, for quantiles, which no sums add up to; sums stay its own."""
    if accelerator.num_processes == 1:
        return of
    labelled = torch.cat([of.token_values, of.token_preferred.to(of.token_values.dtype).unsqueeze(1)], dim=1)
    # filled up with the label -1 to the length of the longest
    everyone = accelerator.gather(accelerator.pad_across_processes(labelled, pad_index=-1))
    everyone = everyone[everyone[:, -1] >= 0]
    return replace(of, token_values=everyone[:, :-1], token_preferred=everyone[:, -1] > 0)


class GroupedRows(Sampler[int]):
    """Rows in an order that no number of processes changes: groups shuffled, each as it stands, then rows without responses.

    Args:
      groups: places of the rows that stay together.
      empty: places of rows that fill up the last batches.
    """

    def __init__(self, groups: Sequence[Sequence[int]], empty: Sequence[int], seed: int | None) -> None:
        self.groups, self.empty = groups, empty
        self.shuffled = SeedableRandomSampler(range(len(groups)), data_seed=seed)

    def __iter__(self) -> Iterator[int]:
        for group in self.shuffled:
            yield from self.groups[group]
        yield from self.empty

    def __len__(self) -> int:
        return sum(map(len, self.groups)) + len(self.empty)

    def set_epoch(self, epoch: int) -> None:
        self.shuffled.set_epoch(epoch)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole weights in every process, also where ZeRO-3 split them while they were loaded (nothing is written back).

    For forward passes before `accelerator.prepare`, which installs the hooks that gather layer by layer.
    """
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
        yield


def reshard(model: nn.Module) -> None:
    """After forward passes outside training: FSDP2 leaves the root's weights whole until the next backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compile_layers(model: PreTrainedModel, backend: str, mode: str | None) -> None:
    """--torch_compile: the model's repeated layers, each in place, so that one compilation serves all of them.

    Shapes are dynamic, because no two packed batches are of one length.
    """
    names = set(model._no_split_modules or ())
    for layer in model.modules():
        if type(layer).__name__ in names:
            layer.compile(backend=backend, mode=mode, dynamic=True)
