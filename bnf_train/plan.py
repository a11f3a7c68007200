"""python -m bnf_train.plan: what a run would take, from the model's configuration alone. Nothing is trained.

    python -m bnf_train.plan --model path/to/model --dataset pairs.jsonl --max_length 512
    python -m bnf_train.plan --model meta-llama/Meta-Llama-3-8B-Instruct --gpus 8 --json plan.json

Flags are those of `python -m bnf_train`, and a few of its own (--help). Weights are not needed: the model is built from
its config.json on tensors without memory, and one forward and backward pass over the largest micro-batch is traced there.
Symbols: P parameters, L trainable ones, G GPUs, V vocabulary, d hidden width, N tokens, n length of a response with its
prompt. All sizes are in bytes, GiB = 2^30 of them.

Measured: full fine-tuning on a CPU in bf16 autocast, where the plan was within 4 % of three runs' peaks (see HEAP_SHARE).
Formulas only, never measured: all rows of GPUs, LoRA, gradient checkpointing. --torch_compile is not accounted for.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnf_train.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor
    from transformers import PreTrainedModel

    from bnf_train.collate import Collator
    from bnf_train.config import BNFConfig
    from bnf_train.data import Row

GIB, MIB = 2**30, 2**20
PAPER = {  # table 7: A100-hours of one training; parameters, by which a local folder is known
    "meta-llama/Meta-Llama-3-8B-Instruct": (40, 8_030_261_248),
    "mistralai/Mistral-7B-Instruct-v0.2": (40, 7_241_732_096),
    "google/gemma-2-9b-it": (56, 9_241_705_984),
}
PAPER_MODEL, PAPER_TFLOPS = "meta-llama/Meta-Llama-3-8B-Instruct", 312.0

CUDA_CONTEXT = 1 * GIB  # an allowance for CUDA's context, NCCL and the allocator's rounding; not measured
# What glibc's heap keeps of freed memory between what stays, as a share of activations, bf16 copies and head: fitted, not
# derived. Measured, bf16 autocast, gradients accumulated: 0.51 (a 47 M Llama, 788 positions), 0.51 (SmolLM2-135M, 844
# positions, 2 micro-batches a step), 0.74 (988 positions, 4 micro-batches a step).
HEAP_SHARE = 0.6
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

ULTRAFEEDBACK_ROWS = 60_000  # about, of the paper's data sets
METHODS = ("full", "lora")
STRATEGIES = ("DDP", "FSDP2", "ZeRO-3")


# --- the model -------------------------------------------------------------------------------------------------------


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


def build(name: str, trust_remote_code: bool, dtype: str = "float32") -> "PreTrainedModel":
    """The model of a folder's or hub name's config.json, on tensors without memory.

    Raises:
      UsageError: no such folder, the hub cannot be reached, or the configuration is of no causal language model.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from bnf_train.load import from_model
    from bnf_train.packed_attention import attend_by_response

    try:
        config = from_model(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    except UsageError as error:
        if Path(name).exists():
            raise
        raise UsageError(f"{str(error)[:-1]}; for a plan a folder with its config.json and --rows are enough.") from error
    kwargs = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    with FakeTensorMode():
        model: PreTrainedModel = from_model(name, lambda: AutoModelForCausalLM.from_config(config, **kwargs))
    attend_by_response(model)
    return model


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


# --- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What the work of one pass over some rows depends on."""

    tokens: int  # prompts and responses
    response_tokens: int
    squares: float  # sum over responses of n^2

    @classmethod
    def of(cls, rows: "Iterable[Row]") -> "Work":
        responses = [r for row in rows for r in row.responses]
        lengths = [len(r.input_ids) for r in responses]
        return cls(sum(lengths), sum(r.tokens for r in responses), float(sum(n * n for n in lengths)))


@dataclass(frozen=True)
class Data:
    """What one epoch and the reference pass go through, and the largest micro-batch."""

    source: str  # "counted" or an estimate from flags
    rows: int
    responses: int
    epoch: Work
    reference: Work  # held-out rows, too
    batches: dict[str, dict[str, "Tensor"]]  # the largest micro-batch ("cuda"), and the largest pass of one process ("cpu")

    @property
    def positions(self) -> dict[str, int]:
        """Positions of each, padding included."""
        return {device: batch["input_ids"].numel() for device, batch in self.batches.items()}


def largest(batches: "Iterable[dict[str, Tensor]]", config: "BNFConfig") -> dict[str, dict[str, "Tensor"]]:
    """Of micro-batches: the one with most positions, and the same of the passes that --tokens_per_pass makes of them."""
    from bnf_train.collate import passes

    def positions(batch: "dict[str, Tensor]") -> int:
        return batch["input_ids"].numel()

    every, most = list(batches), config.tokens_per_pass or math.inf
    parts = [part for batch in every for part in passes(batch, most, whole_rows=config.objective != "bnf")]
    return {"cuda": max(every, key=positions), "cpu": max(parts, key=positions)}


def counted(rows: "Sequence[Row]", held_out: "Sequence[Row]", config: "BNFConfig", collator: "Collator") -> Data:
    """Real rows; the largest micro-batch is that of an epoch in a seeded order."""
    import torch

    size = config.per_device_train_batch_size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    batches = (collator([rows[i] for i in order[start : start + size]]) for start in range(0, len(order), size))
    work = Work.of(rows)
    return Data(
        source="counted",
        rows=len(rows),
        responses=sum(len(row.responses) for row in rows),
        epoch=work,
        reference=Work.of([*rows, *held_out]),
        batches=largest(batches, config),
    )


def estimated(rows: int, prompt: int, response: int, config: "BNFConfig", collator: "Collator") -> Data:
    """Pairs of two responses of one length; the largest micro-batch is of responses of --max_length tokens."""
    from bnf_train.data import Response, Row

    longest = config.max_length
    n = min(prompt + response, longest)
    pair = Row("", [Response([0] * longest, max(longest * prompt // (prompt + response), 1), True)] * 2)
    work = Work(2 * rows * n, 2 * rows * max(n - prompt, 1), 2.0 * rows * n * n)
    return Data(
        source=f"estimated: {rows:,} pairs, prompts of {prompt} tokens, responses of {response}",
        rows=rows,
        responses=2 * rows,
        epoch=work,
        reference=work,
        batches=largest([collator([pair] * config.per_device_train_batch_size)], config),
    )


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


def head_bytes(vocab: int, dim: int, tokens: int, device: str, bf16: bool, width: int = 4, frozen: bool = False) -> int:
    """What the head says that it will hold beyond gradients, for the response tokens of a micro-batch."""
    import torch

    from bnf_core import head_workspace

    narrow = torch.bfloat16 if bf16 else torch.float32
    weight = torch.float32 if width == 4 else torch.bfloat16
    options: dict[str, Any] = {"hidden_dtype": narrow, "weight_dtype": weight, "compute": narrow}
    return sum(head_workspace(tokens, dim, vocab, gpu=device != "cpu", frozen=frozen, **options).values())


def rows_bytes(tokens: int) -> int:
    """44 bytes a token: its id in a Python list, and the reference log-odds. In the memory of the host."""
    return ROW_BYTES * tokens


def base_bytes() -> int:
    """Python with torch, transformers and the trainer, before any model: measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TRAINS_FIRST], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def heap_bytes(held: int) -> int:
    """0.6 of activations, bf16 copies and head: holes in the heap of a CPU process, an empirical share (see HEAP_SHARE)."""
    return round(HEAP_SHARE * held)


@dataclass(frozen=True)
class Traced:
    """Bytes of one micro-batch beyond weights, optimizer and gradients that were there before it."""

    after_forward: int  # what backward will need, bf16 copies of weights included, when the head begins
    most: int  # at any time, the head's own included


def trace(
    model: "PreTrainedModel", batch: dict[str, "Tensor"], bf16: bool, checkpointing: bool, accumulates: bool = True
) -> Traced:
    """One forward and backward pass over `batch` without memory: every allocation and release is counted.

    Exact for whatever the architecture saves; what kernels use inside is not seen. Of the head it has what
    `linear_bnf_loss` allocates. With `accumulates` gradients of an earlier micro-batch are there already, not counted.
    """
    import torch

    switch = "enable" if checkpointing else "disable"
    names = (f"{name}_checkpointing_{switch}" for name in ("activation", "gradient"))
    getattr(
        model, next(name for name in names if hasattr(model, name))
    )()  # named anew in transformers 5.23, where the old name warns
    model.train()
    weight: Any = model.get_output_embeddings().weight
    with _known_lengths(model, batch) as alone, weight.fake_mode, (live := _live_bytes()):
        inputs = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in batch.items() if k in INPUTS}
        places = torch.empty(batch["response_positions"].shape, dtype=torch.long)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if accumulates else None
        live.now = live.most = 0
        if alone:
            inputs.pop("attention_mask", None)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            after_forward = live.now
            hidden = hidden.flatten(0, 1).index_select(0, places)
            chunk = head_bytes(len(weight), weight.shape[1], len(places), "cpu", bf16, weight.element_size())
            loss = _head_allocations().apply(hidden, weight, chunk)
        del hidden
        loss.backward()
    model.zero_grad()
    return Traced(after_forward, live.most)


INPUTS = ("input_ids", "attention_mask", "position_ids")


@contextlib.contextmanager
def _known_lengths(model: "PreTrainedModel", batch: dict[str, "Tensor"]) -> Iterator[bool]:
    """As `bnf_train.packed_attention`, which reads lengths off a mask: a mask without memory has no values to read.

    Whether responses attend each on its own, so that no mask is needed.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = model.config._attn_implementation
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    if not given.startswith("sdpa") or padded:
        model.set_attn_implementation("sdpa" if given.startswith("sdpa") else given)
        yield False
        model.set_attn_implementation(given)
        return
    length = batch["input_ids"].shape[1]
    first = [0] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in itertools.pairwise([*first, length])]

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *part, None, **options)[0] for part in parts], dim=1), None

    AttentionInterface.register("sdpa_of_known_lengths", attend)
    model.set_attn_implementation("sdpa_of_known_lengths")
    yield True
    model.set_attn_implementation(given)


def _head_allocations() -> Any:
    """What `linear_bnf_loss` holds: a chunk, and from forward to backward the gradients of hidden states and weight."""
    import torch
    from torch import Tensor

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
            held = torch.empty(chunk, dtype=torch.uint8)
            ctx.gradients = torch.empty_like(hidden), torch.empty_like(weight)
            del held
            return hidden.new_zeros(())

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            gradients, ctx.gradients = ctx.gradients, None
            return *gradients, None

    return Head


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


def backbone_flops(size: ModelSize, work: Work, epochs: float, checkpointing: bool) -> float:
    """6 P N: 2 forward, 4 backward, for each weight of the backbone's products and token; 8 P N where it is recomputed."""
    return (8 if checkpointing else 6) * size.backbone_linear * work.tokens * epochs


def attention_flops(size: ModelSize, work: Work, epochs: float, checkpointing: bool) -> float:
    """6 n^2 per layer and unit of width: 2 n^2 forward (two products, causal half), 4 n^2 backward; 8 n^2 recomputed."""
    return (8 if checkpointing else 6) * size.layers * size.attention_width * work.squares * epochs


def head_flops(size: ModelSize, work: Work, epochs: float, products: int) -> float:
    """2 V d per response token and product: three for BNF (logits, dhidden, dweight), four where backward recomputes."""
    return 2 * products * size.head * work.response_tokens * epochs


def reference_flops(size: ModelSize, work: Work) -> float:
    """2 P N + 2 n^2 + 2 V d, forward only, once."""
    attention = 2 * size.layers * size.attention_width * work.squares
    return 2 * size.backbone_linear * work.tokens + attention + 2 * size.head * work.response_tokens


def gpu_hours(flops: float, peak_tflops: float, utilization: float) -> float:
    """flops / (peak * utilization), in hours of one GPU."""
    return flops / (peak_tflops * 1e12 * utilization) / 3600


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(config: "BNFConfig", flags: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as numbers; bytes, tokens, FLOPs."""
    model = build(config.model, config.trust_remote_code, config.dtype)
    size = size_of(model, config.lora_r)
    data = _data(config, flags, model)
    bf16, width = bool(config.bf16), 2 if config.dtype == "bfloat16" else 4
    assert config.batch_size is not None
    accumulates = config.batch_size > config.per_device_train_batch_size and data.rows > config.per_device_train_batch_size
    several = data.positions["cpu"] < data.positions["cuda"]  # gradients of a pass stay while the next one runs, too
    accumulating = {"cuda": accumulates, "cpu": accumulates or several}
    traces = {
        (on, device): trace(model, batch, bf16, on, accumulating[device])
        for device, batch in data.batches.items()
        for on in (False, True)
    }

    steps_per_epoch = math.ceil(data.rows / config.batch_size)
    limited = config.max_steps > 0  # goes before epochs, as in training
    epochs = config.max_steps / steps_per_epoch if limited else config.num_train_epochs
    steps = config.max_steps if limited else math.ceil(steps_per_epoch * epochs)
    checkpointing = bool(config.gradient_checkpointing)
    flops = {
        "backbone": backbone_flops(size, data.epoch, epochs, checkpointing),
        "attention": attention_flops(size, data.epoch, epochs, checkpointing),
        "head": head_flops(size, data.epoch, epochs, 3 if config.objective == "bnf" else 4),
        "reference pass": reference_flops(size, data.reference),
    }
    total = sum(flops.values())
    paper = next((name for name, (_, parameters) in PAPER.items() if parameters == size.total), None)
    paper_hours = PAPER[paper or PAPER_MODEL][0]
    copies = autocast_bytes(size, bf16 and width == 4)
    labels = {device: len(batch["response_labels"]) for device, batch in data.batches.items()}

    def memory(method: str, strategy: str, gpus: int, on: bool, device: str, base: int) -> dict[str, Any]:
        lora = method == "lora"
        trainable = size.lora if lora else size.total
        # what the worst moment holds beside weights, optimizer and all gradients: copies, head, and the rest
        traced = traces[on, device]
        beyond = traced.after_forward if lora else traced.most - (0 if accumulating[device] else width * size.total)
        head = size.vocab, size.head // size.vocab, labels[device]
        held = {"bf16 copies": copies}
        held["head"] = 0 if lora else width * size.head + head_bytes(*head, "cpu", bf16, width)
        for name in held:
            held[name] = min(held[name], beyond)
            beyond = max(beyond - held[name], 0)
        if lora:
            held["head"] = head_bytes(*head, device, bf16, width, frozen=True)
        elif device != "cpu":
            held["head"] += head_bytes(*head, device, bf16, width) - head_bytes(*head, "cpu", bf16, width)
        terms = {
            "base": base,
            "weights": weight_bytes(size, strategy, gpus, width) + (4 * size.lora if lora else 0),
            "gradients": gradient_bytes(size, trainable, strategy, gpus, 4 if lora else width),
            "optimizer": optimizer_bytes(trainable, strategy, gpus, str(config.optim.value)),
            **held,
            "activations": beyond,
        }
        if device == "cpu":
            terms["heap"] = heap_bytes(beyond + sum(held.values()))
        return {"method": method, "strategy": strategy, "checkpointing": on, **terms, "total": sum(terms.values())}

    base = base_bytes() + rows_bytes(data.reference.tokens)
    return {
        "model": config.model,
        "parameters": dataclasses.asdict(size) | {"trainable": {"full": size.total, "lora": size.lora}},
        "data": {"source": data.source, "rows": data.rows, "responses": data.responses, "positions": data.positions}
        | {"tokens": data.epoch.tokens, "response_tokens": data.epoch.response_tokens},
        "rows_per_step": config.batch_size,
        "steps": steps,
        "epochs": epochs,
        "tokens": round(data.epoch.tokens * epochs),
        "flops": flops | {"total": total},
        "gpu_hours": gpu_hours(total, flags.peak_tflops, flags.utilization),
        "utilization": flags.utilization,
        "peak_tflops": flags.peak_tflops,
        "paper_model": paper or PAPER_MODEL,
        "paper_gpu_hours": paper_hours,
        "paper_utilization": gpu_hours(total, PAPER_TFLOPS, 1.0) / paper_hours if paper else None,
        "bf16": bf16,
        "gpus": flags.gpus,
        "gpu_memory": [
            memory(method, strategy, flags.gpus, on, "cuda", CUDA_CONTEXT)
            for method in METHODS
            for strategy in STRATEGIES
            for on in (False, True)
        ],
        "cpu_memory": [memory(method, "DDP", 1, on, "cpu", base) for method in METHODS for on in (False, True)],
    }


def _data(config: "BNFConfig", flags: argparse.Namespace, model: "PreTrainedModel") -> Data:
    """Counted where the dataset is a local file and the model's folder has a tokenizer; else estimated from flags."""
    from rich.console import Console

    from bnf_train.collate import Collator, attention_width
    from bnf_train.data import read_and_tokenize
    from bnf_train.load import context_length, load_tokenizer

    context = context_length(config.model, config.trust_remote_code)
    config.max_length = min(config.max_length, context or config.max_length)
    width = attention_width(model)
    assert config.dataset is not None
    there = Path(config.dataset).exists()
    if flags.rows is None and there and any(Path(config.model).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        rows, held_out = read_and_tokenize(config, tokenizer, Console(quiet=True))
        return counted(rows, held_out, config, Collator(int(tokenizer.pad_token_id or 0), config.packing, width))
    if flags.rows is None and not there and Path(config.dataset).suffix:
        raise UsageError(f"--dataset {config.dataset}: no such file; without data pass --rows in its place.")
    collator = Collator(0, config.packing, width)
    rows_given = flags.rows or ULTRAFEEDBACK_ROWS
    return estimated(rows_given, flags.prompt_tokens, flags.response_tokens, config, collator)


def tables(result: dict[str, Any]) -> "Iterator[RenderableType]":
    """The plan as it is printed."""
    from rich.table import Table

    sizes, data, flops = result["parameters"], result["data"], result["flops"]
    summary = Table(title="Plan of a training run", show_header=False)
    summary.add_column(no_wrap=True)
    summary.add_column(overflow="fold")  # a long path is not cut
    hours = f"{result['gpu_hours']:.3g} at {result['utilization']:.0%} of {result['peak_tflops']:g} TFLOP/s"
    paper = f"{result['paper_gpu_hours']} A100-hours for {result['paper_model']}"
    if result["paper_utilization"] is not None:
        paper += f"; these FLOPs in that time are {result['paper_utilization']:.0%} of an A100's {PAPER_TFLOPS:g} TFLOP/s"
    for name, value in (
        ("model", result["model"]),
        ("parameters", f"{sizes['total']:,}, all trainable; LoRA {sizes['trainable']['lora']:,}"),
        ("embedding; head", f"{sizes['embedding']:,}; {sizes['head']:,}, {'tied' if sizes['tied'] else 'untied'}"),
        ("data", data["source"]),
        ("rows, responses", f"{data['rows']:,}, {data['responses']:,}"),
        ("tokens an epoch", f"{data['tokens']:,}, of them response {data['response_tokens']:,}"),
        ("largest micro-batch", f"{data['positions']['cuda']:,} positions; on a CPU {data['positions']['cpu']:,} at a time"),
        ("optimizer steps", f"{result['steps']:,} of {result['rows_per_step']} rows: {result['epochs']:.3g} epochs"),
        ("tokens in all", f"{result['tokens']:,}"),
        *((f"FLOPs, {name}", f"{value:.3e}") for name, value in flops.items()),
        ("GPU-hours", hours),
        ("the paper's", paper),
    ):
        summary.add_row(name, value)
    yield summary
    yield _memory_table(f"GiB on each of {result['gpus']} GPUs (formulas, not measured)", result["gpu_memory"])
    yield _memory_table("GiB of one CPU process", result["cpu_memory"])


def _memory_table(title: str, lines: list[dict[str, Any]]) -> "RenderableType":
    """A column for each way of training, which 80 characters have room for; below what checkpointing changes."""
    from rich.table import Table

    terms = [name for name in lines[0] if name not in ("method", "strategy", "checkpointing")]
    plain, checkpointed = ([line for line in lines if line["checkpointing"] is on] for on in (False, True))
    table = Table("", title=title)
    for line in plain:
        table.add_column(f"{line['method']}\n{line['strategy']}", justify="right", no_wrap=True)

    def add(name: str, of: list[dict[str, Any]], last: bool) -> None:
        table.add_row(name, *(f"{line[name] / GIB:.2f}" for line in of), end_section=last)

    for name in terms:
        add(name, plain, last=name == terms[-1])
    changed = [name for name in terms if [line[name] for line in plain] != [line[name] for line in checkpointed]]
    table.add_row("checkpointing:")
    for name in changed:
        add(name, checkpointed, last=False)
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
        "rows": (int, None, "pairs, in place of reading --dataset (default for a dataset of the hub: 60,000)"),
        "prompt_tokens": (int, 200, "tokens of a prompt, estimated where they cannot be counted"),
        "response_tokens": (int, 400, "tokens of a response, estimated where they cannot be counted"),
    }
    for name, (kind, default, text) in numbers.items():
        names = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        more = "" if default is None else f" (default: {default})"
        parser.add_argument(*names, dest=name, type=kind, default=default, help=text + more)
    parser.add_argument("--json", metavar="FILE", help="write the plan there too, as JSON; - prints JSON only")
    flags, rest = parser.parse_known_args(list(arguments))
    for name in numbers:
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name}: expected a number above 0, got {value}.")
    if flags.utilization > 1:
        raise UsageError(f"--utilization: expected a share of at most 1, got {flags.utilization}.")
    return flags, rest


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console

    try:
        flags, rest = _flags(sys.argv[1:] if arguments is None else arguments)
        from bnf_train.config import parse

        # --rows stands in place of a dataset, and of what the config says when there is none
        result = plan(parse(rest if flags.rows is None else [*rest, "--dataset", "rows"]), flags)
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
