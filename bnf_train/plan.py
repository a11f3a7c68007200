"""python -m bnf_train.plan: what a run would take, from the model's configuration alone. Nothing is trained.

    python -m bnf_train.plan --model path/to/model --dataset pairs.jsonl --max_length 512
    python -m bnf_train.plan --model meta-llama/Meta-Llama-3-8B-Instruct --gpus 8 --json plan.json

Flags are those of `python -m bnf_train`, and a few of its own (--help). Weights are not needed: the model is built from
its config.json on tensors without memory, and one forward and backward pass over the largest micro-batch is traced there.
Symbols: P parameters, L trainable ones, G GPUs, V vocabulary, d hidden width, N tokens, n length of a response with its
prompt. All sizes are in bytes, GiB = 2^30 of them.
"""

import argparse
import dataclasses
import functools
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnf_train.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor
    from transformers import PreTrainedModel

    from bnf_train.config import BNFConfig
    from bnf_train.data import Row

GIB, MIB = 2**30, 2**20
PAPER = {  # table 7: A100-hours of one training
    "meta-llama/Meta-Llama-3-8B-Instruct": 40,
    "mistralai/Mistral-7B-Instruct-v0.2": 40,
    "google/gemma-2-9b-it": 56,
}
PAPER_MODEL, PAPER_TFLOPS = "meta-llama/Meta-Llama-3-8B-Instruct", 312.0

# What the log-odds head holds at most beside dweight: exponentials of a chunk of tokens; tiles of logits where the
# weight is frozen and no chunk is held.
HEAD_CHUNK = {"cpu": 56 * MIB, "cuda": 448 * MIB}
HEAD_TILES = {"cpu": 16 * MIB, "cuda": 128 * MIB}
CUDA_CONTEXT = 1 * GIB  # an allowance for CUDA's context, NCCL and the allocator's rounding; not measured
# What glibc's heap keeps of freed memory between what stays, as a share of activations and bf16 copies: fitted by
# eye to two bf16 measurements of one 42 M Llama (0.41, 0.60), not derived; other sizes are unmeasured.
HEAP_SHARE = 0.5
OPTIMIZER_BYTES = {"sgd": 0, "adamw_torch_8bit": 2, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_torch_4bit": 1}
ADAMW_BYTES = 8  # two float32 moments of each trainable parameter
ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
ROW_BYTES = 44  # a token id in a Python list (pointer and integer), and its reference log-odds
TRAINS_FIRST = """
import psutil, torch, transformers
import bnf_train.collate, bnf_train.config, bnf_train.data, bnf_train.load, bnf_train.model_head
import bnf_train.reference_cache, bnf_train.report, bnf_train.trainer
layer = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
for bf16 in (True, False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        layer(torch.randn(256, 256)).float().sum().backward()
optimizer.step()
print(psutil.Process().memory_info().rss)
"""

METHODS = ("full", "lora")
STRATEGIES = ("DDP", "FSDP2", "ZeRO-3")


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a causal language model, counted on tensors without memory."""

    total: int  # a tied head is counted once
    embedding: int
    head: int  # vocab * dim, also where it is the embedding
    tied: bool
    backbone_linear: int  # weights of the backbone's matrix products: what autocast copies, what 6 N counts
    largest_layer: int  # what is gathered at a time where weights are sharded
    layers: int
    attention_width: int  # heads * head_dim
    lora: int  # parameters of adapters on every matrix product of the backbone


def build(name: str, trust_remote_code: bool) -> "PreTrainedModel":
    """The model of a folder's or hub name's config.json, in float32; call it under a mode of fake tensors.

    Raises:
      UsageError: no such folder, the hub cannot be reached, or the configuration is of no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bnf_train.load import _from_model

    config = _from_model(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    return _from_model(
        name,
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code),
    )


def size_of(model: "PreTrainedModel", lora_rank: int) -> ModelSize:
    """LoRA adapters: rank * (inputs + outputs) for every matrix of the backbone."""
    from torch import nn

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
        tied=head is embedding,
        backbone_linear=_count(linear),
        largest_layer=largest,
        layers=config.num_hidden_layers,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        lora=sum(lora_rank * (p.shape[-1] + p.shape[-2]) * math.prod(p.shape[:-2]) for p in linear),
    )


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


# --- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """What one epoch goes through, and its largest micro-batch."""

    source: str  # "counted" or an estimate from flags
    rows: int
    responses: int
    tokens: int  # prompts and responses
    response_tokens: int
    squares: float  # sum over responses of n^2
    batch: dict[str, "Tensor"]  # the largest micro-batch, as the collator makes it

    @property
    def positions(self) -> int:
        """Positions of the largest micro-batch, padding included."""
        return self.batch["input_ids"].numel()


def counted(rows: "Sequence[Row]", config: "BNFConfig", pad: int) -> Tokens:
    """Tokens of real rows; the largest micro-batch is that of the epoch in a seeded order."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    size = config.per_device_train_batch_size
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    lengths = [len(r.input_ids) for row in rows for r in row.responses]
    return Tokens(
        source="counted",
        rows=len(rows),
        responses=len(lengths),
        tokens=sum(lengths),
        response_tokens=sum(r.tokens for row in rows for r in row.responses),
        squares=float(sum(n * n for n in lengths)),
        batch=_collated(max(batches, key=lambda batch: _positions(batch, config)), config, pad),
    )


def estimated(rows: int, prompt: int, response: int, config: "BNFConfig") -> Tokens:
    """Pairs of two responses of one length; the largest micro-batch is of responses as long as --max_length allows."""
    from bnf_train.data import Response, Row

    n = min(prompt + response, config.max_length)
    pair = Row("", [Response([0] * config.max_length, max(config.max_length * prompt // (prompt + response), 1), True)] * 2)
    return Tokens(
        source=f"estimated: {rows:,} pairs, prompts of {prompt} tokens, responses of {response}",
        rows=rows,
        responses=2 * rows,
        tokens=2 * rows * n,
        response_tokens=2 * rows * max(n - prompt, 1),
        squares=2.0 * rows * n * n,
        batch=_collated([pair] * config.per_device_train_batch_size, config, 0),
    )


def _positions(rows: "Sequence[Row]", config: "BNFConfig") -> int:
    return _collated(rows, config, 0)["input_ids"].numel()


def _collated(rows: "Sequence[Row]", config: "BNFConfig", pad: int) -> dict[str, "Tensor"]:
    from bnf_train.collate import Collator

    return Collator(pad, config.packing, _attention_width(config.model, config.trust_remote_code))(rows)


@functools.cache
def _attention_width(name: str, trust_remote_code: bool) -> float:
    """Of `bnf_train.collate.attention_width`, from the configuration alone: attention that computes what it masks."""
    from transformers import AutoConfig

    return 6.0 * float(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config().hidden_size)


# --- memory: one function per term, bytes per process ------------------------------------------------------------------


def weight_bytes(size: ModelSize, strategy: str, gpus: int, width: int = 4) -> int:
    """4 P; sharded 4 P / G and what is gathered at a time: two layers, embedding and head (FSDP2), or 10^9 weights (ZeRO-3).

    Held, gathered and updated in float32 (`width` 4); bf16 autocast multiplies copies, see `autocast_bytes`.
    """
    if strategy == "DDP":
        return width * size.total
    around = size.embedding + (0 if size.tied else size.head)
    gathered = 2 * size.largest_layer + around if strategy == "FSDP2" else ZERO3_LIVE_PARAMETERS
    return width * (size.total // gpus + min(gathered, size.total))


def autocast_bytes(size: ModelSize, bf16: bool) -> int:
    """2 bytes for each weight of the backbone's matrix products: bf16 copies, which backward needs again. The head has none."""
    return 2 * size.backbone_linear if bf16 else 0


def gradient_bytes(size: ModelSize, trainable: int, strategy: str, gpus: int, width: int = 4) -> int:
    """4 L, twice under DDP, which reduces from buckets of its own; sharded 4 L / G and the layer at work."""
    if strategy == "DDP":
        return width * trainable * (2 if gpus > 1 else 1)
    return width * (trainable // gpus + min(size.largest_layer, trainable))


def optimizer_bytes(trainable: int, strategy: str, gpus: int, optim: str) -> int:
    """8 L of AdamW (two float32 moments), over G where sharded."""
    each = OPTIMIZER_BYTES.get(optim, ADAMW_BYTES)
    return each * trainable // (1 if strategy == "DDP" else gpus)


def head_bytes(size: ModelSize, frozen: bool, device: str) -> int:
    """4 V d of dweight in float32 and a chunk of exponentials; where the weight is frozen tiles of logits only."""
    return HEAD_TILES[device] if frozen else 4 * size.head + HEAD_CHUNK[device]


def rows_bytes(tokens: Tokens) -> int:
    """44 bytes a token: its id in a Python list, and the reference log-odds. In the memory of the host."""
    return ROW_BYTES * tokens.tokens


def base_bytes() -> int:
    """Python with torch, transformers and the trainer, before any model: measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TRAINS_FIRST], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def heap_bytes(activations: int, copies: int) -> int:
    """Half of activations and bf16 copies: holes in the heap of a CPU process, an empirical share (see HEAP_SHARE)."""
    return round(HEAP_SHARE * (activations + copies))


@dataclass(frozen=True)
class Activations:
    """Traced bytes of one micro-batch, beyond weights and gradients; bf16 copies of weights are in both."""

    after_forward: int  # what backward will need, when the head begins
    in_backward: int  # the most at any time


def activation_bytes(traced: Activations, copies: int, head: int, chunk: int) -> int:
    """What the worst moment holds beside weights, gradients, optimizer, copies and head.

    That moment is the head's (everything is saved, the chunk is there) or in backward (a layer's gradients are).
    """
    return max(max(traced.after_forward + head, traced.in_backward + head - chunk) - head - copies, 0)


def trace(model: "PreTrainedModel", batch: dict[str, "Tensor"], bf16: bool, checkpointing: bool) -> Activations:
    """One forward and backward of the backbone over `batch` without memory: every allocation and release is counted.

    Exact for whatever the architecture saves, attention masks included; what kernels use inside is not seen.
    Call it under the mode of fake tensors that the model was built in.
    """
    import torch

    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    model.train()
    for p in model.parameters():  # gradients are there already, as in all micro-batches but the first
        p.grad = torch.zeros_like(p)
    inputs = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in batch.items() if k in INPUTS}
    with (live := _live_bytes()), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        after_forward = live.now
        scalar = hidden.sum()
    del hidden
    with live:
        scalar.backward()
    model.zero_grad()
    return Activations(after_forward, live.most)


INPUTS = ("input_ids", "attention_mask", "position_ids")


def _live_bytes() -> Any:
    """A mode that counts the bytes of storages made under it and still alive: `now`, and at `most`."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        now = most = 0

        def __init__(self) -> None:
            super().__init__()
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            mine = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
            out = func(*args, **(kwargs or {}))
            for x in tree_iter(out):
                if isinstance(x, Tensor):
                    self._add(x.untyped_storage(), mine)
            self.most = max(self.most, self.now)
            return out

        def _add(self, storage: Any, of_arguments: set[int]) -> None:
            if storage not in self.known and id(storage) not in of_arguments:  # a view or an in-place result is no new memory
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())

        def _free(self, size: int) -> None:
            self.now -= size

    return Live()


# --- work ------------------------------------------------------------------------------------------------------------


def backbone_flops(size: ModelSize, tokens: Tokens, epochs: float, checkpointing: bool) -> float:
    """6 P N: 2 forward, 4 backward, for each weight of the backbone's products and token; 8 P N where it is recomputed."""
    return (8 if checkpointing else 6) * size.backbone_linear * tokens.tokens * epochs


def attention_flops(size: ModelSize, tokens: Tokens, epochs: float, checkpointing: bool) -> float:
    """6 n^2 per layer and unit of width: 2 n^2 forward (two products, causal half), 4 n^2 backward; 8 n^2 recomputed."""
    return (8 if checkpointing else 6) * size.layers * size.attention_width * tokens.squares * epochs


def head_flops(size: ModelSize, tokens: Tokens, epochs: float, products: int) -> float:
    """2 V d per response token and product: three for BNF (logits, dhidden, dweight), four where backward recomputes."""
    return 2 * products * size.head * tokens.response_tokens * epochs


def reference_flops(size: ModelSize, tokens: Tokens) -> float:
    """2 P N + 2 n^2 + 2 V d, forward only, once."""
    attention = 2 * size.layers * size.attention_width * tokens.squares
    return 2 * size.backbone_linear * tokens.tokens + attention + 2 * size.head * tokens.response_tokens


def gpu_hours(flops: float, peak_tflops: float, utilization: float) -> float:
    """flops / (peak * utilization), in hours of one GPU."""
    return flops / (peak_tflops * 1e12 * utilization) / 3600


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(config: "BNFConfig", flags: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as numbers; bytes, tokens, FLOPs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tokens = _tokens(config, flags)
    bf16, bf16_weights = bool(config.bf16), getattr(config, "dtype", "float32") == "bfloat16"
    with FakeTensorMode():
        model = build(config.model, config.trust_remote_code)
        size = size_of(model, flags.lora_rank)
        traces = {on: trace(model, tokens.batch, bf16, on) for on in (False, True)}
    products = 3 if config.objective == "bnf" else 4
    checkpointing = bool(config.gradient_checkpointing)
    epochs = config.num_train_epochs
    flops = {
        "backbone": backbone_flops(size, tokens, epochs, checkpointing),
        "attention": attention_flops(size, tokens, epochs, checkpointing),
        "head": head_flops(size, tokens, epochs, products),
        "reference pass": reference_flops(size, tokens),
    }
    total = sum(flops.values())
    assert config.batch_size is not None
    steps = math.ceil(math.ceil(tokens.rows / config.batch_size) * epochs)
    paper = PAPER.get(config.model, PAPER[PAPER_MODEL])
    width = 2 if bf16_weights else 4

    def memory(method: str, strategy: str, gpus: int, on: bool, device: str, base: int) -> dict[str, Any]:
        trainable = size.lora if method == "lora" else size.total
        adapters = size.lora if method == "lora" else 0
        copies = autocast_bytes(size, bf16 and not bf16_weights)
        head = head_bytes(size, method == "lora", device)
        chunk = (HEAD_TILES if method == "lora" else HEAD_CHUNK)[device]
        terms = {
            "base": base,
            "weights": weight_bytes(size, strategy, gpus, width) + 4 * adapters,
            "bf16 copies": copies,
            "gradients": gradient_bytes(size, trainable, strategy, gpus, width),
            "optimizer": optimizer_bytes(trainable, strategy, gpus, str(config.optim.value)),
            "activations": activation_bytes(traces[on], copies, head, chunk),
            "head": head,
        }
        if device == "cpu":
            terms["heap"] = heap_bytes(terms["activations"], copies)
        return {
            "method": method, "strategy": strategy, "checkpointing": on, **terms, "total": sum(terms.values())
        }  # fmt: skip

    return {
        "model": config.model,
        "parameters": dataclasses.asdict(size) | {"trainable": {"full": size.total, "lora": size.lora}},
        "data": {k: getattr(tokens, k) for k in ("source", "rows", "responses", "tokens", "response_tokens", "positions")},
        "rows_per_step": config.batch_size,
        "steps": config.max_steps if config.max_steps > 0 else steps,
        "epochs": epochs,
        "flops": flops | {"total": total},
        "gpu_hours": gpu_hours(total, flags.peak_tflops, flags.utilization),
        "utilization": flags.utilization,
        "peak_tflops": flags.peak_tflops,
        "paper_gpu_hours": paper,
        "paper_utilization": gpu_hours(total, PAPER_TFLOPS, 1.0) / paper if config.model in PAPER else None,
        "bf16": bf16,
        "gpus": flags.gpus,
        "gpu_memory": [
            memory(method, strategy, flags.gpus, on, "cuda", CUDA_CONTEXT)
            for method in METHODS
            for strategy in STRATEGIES
            for on in (False, True)
        ],
        "cpu_memory": [
            memory("full", "DDP", 1, on, "cpu", base) for base in [base_bytes() + rows_bytes(tokens)] for on in (False, True)
        ],
    }


def _tokens(config: "BNFConfig", flags: argparse.Namespace) -> Tokens:
    """Counted where the dataset is a local file and the model's folder has a tokenizer; else estimated from flags."""
    from rich.console import Console

    from bnf_train.__main__ import _rows
    from bnf_train.load import context_length, load_tokenizer

    context = context_length(config.model, config.trust_remote_code)
    config.max_length = min(config.max_length, context or config.max_length)
    assert config.dataset is not None
    if Path(config.dataset).exists() and any(Path(config.model).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        rows, _ = _rows(config, tokenizer, Console(quiet=True))
        return counted(rows, config, int(tokenizer.pad_token_id or 0))
    if Path(config.dataset).suffix and not Path(config.dataset).exists():
        raise (
            UsageError(f"{config.dataset}: no such file.")
            if config.dataset.endswith((".jsonl", ".json"))
            else UsageError(f"--dataset {config.dataset}: no such file.")
        )
    return estimated(flags.rows, flags.prompt_tokens, flags.response_tokens, config)


def tables(result: dict[str, Any]) -> "Iterator[RenderableType]":
    """The plan as it is printed."""
    from rich.table import Table

    sizes, data, flops = result["parameters"], result["data"], result["flops"]
    summary = Table(title=f"{result['model']}: plan", show_header=False)
    head = f"{sizes['head']:,}, {'tied to the embedding' if sizes['tied'] else 'untied'}"
    hours = f"{result['gpu_hours']:.3g} at {result['utilization']:.0%} of {result['peak_tflops']:g} TFLOP/s"
    paper = f"{result['paper_gpu_hours']} A100-hours for " + (result["model"] if result["model"] in PAPER else PAPER_MODEL)
    for name, value in (
        ("parameters", f"{sizes['total']:,}, all trainable; LoRA {sizes['trainable']['lora']:,}"),
        ("embedding; head", f"{sizes['embedding']:,}; {head}"),
        ("data", f"{data['source']}"),
        ("rows, responses", f"{data['rows']:,}, {data['responses']:,}"),
        ("tokens, of them response", f"{data['tokens']:,}, {data['response_tokens']:,} an epoch"),
        ("largest micro-batch", f"{data['positions']:,} positions"),
        ("optimizer steps", f"{result['steps']:,} of {result['rows_per_step']} rows"),
        *((f"FLOPs, {name}", f"{value:.3e}") for name, value in flops.items()),
        ("GPU-hours", hours),
        ("the paper's", paper),
    ):
        summary.add_row(name, value)
    if result["paper_utilization"] is not None:
        summary.add_row("", f"these FLOPs in that time are {result['paper_utilization']:.0%} of an A100's {PAPER_TFLOPS:g}")
    yield summary
    yield _memory_table(f"GiB on each of {result['gpus']} GPUs (formulas)", result["gpu_memory"])
    yield _memory_table("GiB of one CPU process", result["cpu_memory"])


def _memory_table(title: str, lines: list[dict[str, Any]]) -> "RenderableType":
    from rich.table import Table

    terms = [name for name in lines[0] if name not in ("method", "strategy", "checkpointing")]
    table = Table(title=title)
    for name in ("training", "checkpointing", *terms):
        table.add_column(name, justify="right" if name in terms else "left")
    for line in lines:
        values = [f"{line[name] / GIB:.2f}" for name in terms]
        table.add_row(f"{line['method']}, {line['strategy']}", "yes" if line["checkpointing"] else "no", *values)
    return table


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The plan's own flags, and what is left for training's."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(f"{message} (python -m bnf_train.plan --help lists the plan's flags).")

    parser = Parser(prog="python -m bnf_train.plan", allow_abbrev=False, description=(__doc__ or "").partition("\n")[0],
                    epilog="Every other flag is one of python -m bnf_train.")  # fmt: skip
    numbers: dict[str, tuple[Any, Any, str]] = {
        "utilization": (float, 0.4, "share of the peak that training reaches"),
        "peak_tflops": (float, PAPER_TFLOPS, "peak of one GPU in bf16, 10^12 FLOP/s (A100: 312, H100: 989)"),
        "gpus": (int, 8, "GPUs that DDP, FSDP2 and ZeRO-3 spread over"),
        "lora_rank": (int, 16, "rank of LoRA's adapters, on every matrix of the backbone"),
        "rows": (int, 60_000, "pairs of a dataset that is no local file (UltraFeedback: about 60,000)"),
        "prompt_tokens": (int, 200, "tokens of a prompt, estimated where they cannot be counted"),
        "response_tokens": (int, 400, "tokens of a response, estimated where they cannot be counted"),
    }
    for name, (kind, default, text) in numbers.items():
        names = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(*names, dest=name, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too, as JSON; - prints JSON only")
    flags, rest = parser.parse_known_args(list(arguments))
    for name in numbers:
        if not getattr(flags, name) > 0:
            raise UsageError(f"--{name}: expected a number above 0, got {getattr(flags, name)}.")
    if flags.utilization > 1:
        raise UsageError(f"--utilization: expected a share of at most 1, got {flags.utilization}.")
    return flags, rest


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console

    try:
        flags, rest = _flags(sys.argv[1:] if arguments is None else arguments)
        from bnf_train.config import parse

        result = plan(parse(rest), flags)
        text = json.dumps(result, indent=2) + "\n"
        if flags.json == "-":
            print(text, end="")
            return 0
        if flags.json:
            Path(flags.json).write_text(text)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    for table in tables(result):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
