"""Log-odds of every response token under the reference: one pass before training, 4 bytes a token, kept for the next run.

rows -> their distinct responses, longest first -> batches, each process its share -> one vector over response tokens

That order, and so the batches and their rounding, is that of the contents, not of the rows: rows in any order, with any
labels, find the same values in the same file. A file's name is the digest of its manifest, which names all that the
values depend on, so that what differs in anything is another file.
"""

import json
import os
import uuid
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bnf_core
from bnf_train.data import Collator, Response, Row
from bnf_train.errors import UsageError
from bnf_train.model.attention import attention_of
from bnf_train.model.load import load_tokenizer
from bnf_train.model.score import score

TENSOR = "log_odds"


def add_ref_log_odds(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collator: Collator,
    device: torch.device,
    autocast: torch.dtype | None,
    batch_size: int,
    *,
    cache: Path | None = None,
    weights: str = "",
    template: str = "",
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> None:
    """Fill in `ref_log_odds` of every response, (tokens,) float32, from the reference or from what an earlier run kept.

    The same forward, autocast, head and collator as in training, so that w = 1 up to the noise of another padding.

    Args:
      model: the reference, with the log-odds head.
      batch_size: responses of the longest one's length in a forward pass; of shorter ones as many more.
      cache: folder of the files; None keeps nothing. One that cannot be written costs a warning, not the run.
      weights, template: the model's `weights_digest` and the chat template, for the manifest.
      say: takes one sentence: what was reused, and every warning. On the first process only.

    Raises:
      UsageError: the reference gives a response NaN or infinite log-odds.
    """
    groups = _by_content(rows, collator.share_prompts)
    responses = [response for response, *_ in groups]
    tokens = [response.tokens for response in responses]
    values, path, manifest = None, None, {}
    if cache is not None and _place()[0] == 0:
        manifest = _manifest(model, responses, collator, device, autocast, weights, template)
        path = cache / f"{_digest([json.dumps(manifest, sort_keys=True).encode()])}.safetensors"
        values = _read(path, manifest, sum(tokens), say)
        if values is not None:
            say(f"Reference log-odds of {sum(tokens):,} response tokens: reused from {path}.")
    values = _from_rank_0(values, sum(tokens), device)
    if values is None:
        values = _reference_pass(model, responses, collator, device, autocast, batch_size, progress)
        if not values.isfinite().all():
            wrong = next(r for r, v in zip(responses, values.split(tokens), strict=True) if not v.isfinite().all())
            number = next(row.number for row in rows for r in row.responses if r is wrong)
            raise UsageError(
                f"row {number}: the reference gives its response NaN or infinite log-odds; look for damaged weights, or "
                "try --bf16 false."
            )
        if path is not None:
            _write(path, values, manifest, say)
    for group, part in zip(groups, values.split(tokens), strict=True):
        for response in group:
            response.ref_log_odds = part


def check_same_tokens(name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Log-odds of two models compare only where a token id is the same token in both.

    Raises:
      UsageError: no model at `name`, or its tokenizer has another vocabulary.
    """
    other = load_tokenizer(name, trust_remote_code, "--ref_model")
    if other.get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"--ref_model {name}: its tokenizer has another vocabulary than --model's; use a model of its family.")


# --- the pass --------------------------------------------------------------------------------------------------------


def _by_content(rows: Iterable[Row], together: bool) -> list[list[Response]]:
    """Responses of one content (token ids, prompt, which of them count); longest first, among equals by their ids.

    With `together`, those to one prompt stand together, in the place of the longest of them.
    """
    groups: defaultdict[tuple[int, bytes, int, bytes], list[Response]] = defaultdict(list)
    longest: defaultdict[bytes, int] = defaultdict(int)
    prompts = {}
    for row in rows:
        for response in row.responses:
            ids = array("i", response.input_ids).tobytes()
            key = -len(ids), ids, response.prompt_length, _left_out(response).tobytes()
            groups[key].append(response)
            prompts[key] = ids[: 4 * response.prompt_length] if together else ids
            longest[prompts[key]] = max(longest[prompts[key]], len(ids))
    return [groups[key] for key in sorted(groups, key=lambda key: (-longest[prompts[key]], prompts[key], key))]


def _left_out(response: Response) -> "array[int]":
    """Places of the tokens behind the prompt that do not count, as -1 - place: no token id, no length."""
    places = range(response.prompt_length, len(response.input_ids))
    weights = response.weights or ()
    return array("i", [-1 - at for at, weight in zip(places, weights, strict=False) if not weight])


def _batches(responses: Iterable[Response], batch_size: int) -> list[list[Response]]:
    """Consecutive responses, longest first; padded, a batch is no larger than `batch_size` of the very longest."""
    batches: list[list[Response]] = []
    longest = 0
    for response in responses:
        if not batches or (len(batches[-1]) + 1) * longest > batch_size * len(batches[0][0].input_ids):
            batches.append([])
            longest = 0
        batches[-1].append(response)
        longest = max(longest, len(response.input_ids))
    return batches


def _reference_pass(
    model: PreTrainedModel,
    responses: Sequence[Response],
    collator: Collator,
    device: torch.device,
    autocast: torch.dtype | None,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Log-odds of all response tokens, one response behind the other, in every process."""
    batches = _batches(responses, batch_size)
    rank, processes = _place()
    mine = batches[rank::processes]
    total = sum(_tokens(batch) for batch in mine)  # others' shares are about as large
    with tqdm(total=total, desc="reference log-odds", unit=" tokens", disable=not progress or rank > 0) as bar:
        scored = score(model.to(device), mine, collator, device, autocast, done=lambda batch: bar.update(_tokens(batch)))
    values, place, own = torch.zeros(_tokens(responses)), 0, iter(scored)
    for number, batch in enumerate(batches):
        if number % processes == rank:
            values[place : place + _tokens(batch)] = torch.cat([next(own).log_odds for _ in batch])
        place += _tokens(batch)
    if processes > 1:
        everyone = values.to(device)
        dist.all_reduce(everyone)  # exact: all but one process hold zeros
        values = everyone.cpu()
    return values


def _tokens(responses: Iterable[Response]) -> int:
    return sum(r.tokens for r in responses)


def _place() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _from_rank_0(values: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """What the first process holds, in every process: the others need not see its folder."""
    if _place()[1] == 1:
        return values
    found = torch.tensor([values is not None], dtype=torch.int32, device=device)
    dist.broadcast(found, 0)
    if not found.item():
        return None
    everyone = torch.empty(tokens, device=device) if values is None else values.to(device)
    dist.broadcast(everyone, 0)
    return everyone.cpu()


# --- the file --------------------------------------------------------------------------------------------------------


def _manifest(
    model: PreTrainedModel,
    responses: Sequence[Response],
    collator: Collator,
    device: torch.device,
    autocast: torch.dtype | None,
    weights: str,
    template: str,
) -> dict[str, Any]:
    """All that the values depend on; neither where the model lies nor how many processes share the work."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    ids = (array("i", [len(r.input_ids), r.prompt_length, *r.input_ids]) + _left_out(r) for r in responses)
    return {
        "weights": weights or weights_digest(model),
        "architecture": type(model).__name__,
        "config": _digest([json.dumps(config, sort_keys=True, default=str).encode()]),
        "token_ids": _digest(ids),
        "template": _digest([template.encode()]),
        "dtype": str(model.get_output_embeddings().weight.dtype),
        "autocast": str(autocast or None),
        "float32_products": [b.matmul.fp32_precision for b in (torch.backends.cuda, torch.backends.mkldnn)],
        "attention": attention_of(model),
        "head": "linear_log_odds",
        "packed": "prompts shared" if collator.share_prompts else collator.packed,
        "compiled": any(module._compiled_call_impl is not None for module in model.modules()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bnf-align": bnf_core.__version__,
    }


def weights_digest(model: PreTrainedModel) -> str:
    """Of every weight and buffer with its name, dtype and shape; at the speed of memory."""
    weights = (*model.named_parameters(), *model.named_buffers())
    return _digest(part for name, p in weights for part in (f"{name} {p.dtype} {list(p.shape)}".encode(), _bytes(p)))


def _read(path: Path, manifest: dict[str, Any], tokens: int, say: Callable[[str], object]) -> Tensor | None:
    """The values in `path`; None, and a warning, where there are none that can be trusted."""
    try:
        with safe_open(path, "pt") as file:
            metadata, values = file.metadata(), file.get_tensor(TENSOR).clone()
        if (values.dtype, values.shape) != (torch.float32, (tokens,)) or metadata != _metadata(values, manifest):
            raise SafetensorError("its contents do not match its checksum or manifest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, OSError, ValueError) as error:
        say(f"warning: {path} is damaged ({' '.join(str(error).split())}); the reference log-odds are computed anew.")
        return None
    return values


def _write(path: Path, values: Tensor, manifest: dict[str, Any], say: Callable[[str], object]) -> None:
    """Whole or not at all: a reader, or a run that is killed, never leaves half a file under its name."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(save({TENSOR: values}, metadata=_metadata(values, manifest)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        say(
            f"warning: --reference_cache {path.parent}: {(error.strerror or str(error)).lower()}; this run goes on with the "
            "reference log-odds in memory, the next one computes them anew."
        )


def _metadata(values: Tensor, manifest: dict[str, Any]) -> dict[str, str]:
    """One entry: safetensors writes several in an order that changes from run to run."""
    return {"manifest": json.dumps(manifest | {"checksum": _digest([_bytes(values)])}, sort_keys=True)}


def _digest(parts: Iterable[Any]) -> str:
    """128 bits against accidents, not against forgers: at the speed of memory, where blake2b takes a minute for 8B weights."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
