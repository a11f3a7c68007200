"""What log-odds depend on besides the response: its neighbours in a batch, random numbers of training mode. Found by trying."""

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_train.data import Collator, Response, Row
from bnf_train.errors import UsageError
from bnf_train.model.attention import NAME, attention_of
from bnf_train.model.head import router_loss_coefficient
from bnf_train.model.score import score

# the mean over a response's tokens, in nats: of single tokens an expert that was chosen narrowly may make more
ROUNDING = 1e-3  # float32 passes over batches of other shapes differ by less
# more than that, padded, is no rounding; in half precision padding alone makes up to 0.015
NEIGHBOURS, NEIGHBOURS_IN_HALF = 1e-2, 0.1


def can_pack(model: PreTrainedModel, rows: Sequence[Row], batch_size: int, packing: bool, device: torch.device) -> bool:
    """Whether responses that stand one behind the other in a sequence do not see each other, by trying it on the data.

    cu_seq_lens and positions that start again at 0 keep them apart, with the attention implementations and the
    architectures that can. The largest micro-batch and the shortest response are packed into one sequence, so that each
    threshold that the run will reach (a window, positions counted over the sequence, rotary embeddings that depend on
    the longest response) is reached here. Costs two forward passes of that batch, three where the answer is no.

    Args:
      model: with the log-odds head; it is moved to `device`.
      rows: all rows that the model will see, of `batch_size` to a micro-batch.
      packing: whether packing is asked for.

    Raises:
      UsageError: padded responses depend on the others of their batch, too.
    """
    responses = _largest(rows, batch_size)
    if len(responses) < 2:
        return packing
    model.to(device)
    # the shortest first: rotary embeddings that grow with the longest sequence keep what they have grown to
    alone = torch.cat([s.log_odds for s in score(model, [[r] for r in responses[::-1]], Collator(0), device)[::-1]])

    def most(log_odds: Tensor) -> float:
        return _largest_mean(log_odds - alone, responses)

    rounds = _rounds(model)
    if packing:
        try:
            packed = most(_of_batch(model, responses, Collator(0, packed=True), device))
        except (TypeError, ValueError, RuntimeError):  # an architecture without position_ids, or that takes no cu_seq_lens
            packed = math.inf
        # in half precision: less than a good part of what seeing the others does
        if packed < (0.1 * most(_seeing(model, responses, device)) if rounds else ROUNDING):
            return True
    if most(_of_batch(model, responses, Collator(0), device)) > (NEIGHBOURS_IN_HALF if rounds else NEIGHBOURS):
        raise UsageError(_why(model, [len(r.input_ids) for r in responses]))
    return False


def can_share_prompts(model: PreTrainedModel, rows: Sequence[Row], device: torch.device) -> bool:
    """Whether responses behind a prompt that is computed once are what they are behind one of their own, by trying it.

    On the longest and the shortest response of the data, each beside one that goes on otherwise from its middle. Costs a
    forward pass of each and one of all; to be asked where `can_pack` says yes.
    """
    if attention_of(model) != NAME or router_loss_coefficient(model):  # a router loss counts each prompt that is computed
        return False
    ids = sorted((r.input_ids for row in rows for r in row.responses if len(r.input_ids) > 3), key=len)
    if not ids:
        return False
    responses = []
    for x in (ids[-1], ids[0]):
        prompt, rest = x[: len(x) // 2], x[len(x) // 2 :]
        responses += [Response(prompt + own, len(prompt), True) for own in (rest, rest[::-1])]
    alone = torch.cat([s.log_odds for s in score(model, [[r] for r in responses], Collator(0), device)])
    try:
        shared = _of_batch(model, responses, Collator(0, packed=True, share_prompts=True), device)
    except (TypeError, ValueError, RuntimeError):  # a mask of its own, or an argument that it does not know
        return False
    most = 0.1 * _largest_mean(_seeing(model, responses, device) - alone, responses) if _rounds(model) else ROUNDING
    return _largest_mean(shared - alone, responses) < most


def _largest_mean(errors: Tensor, responses: Sequence[Response]) -> float:
    """Of the responses, the largest mean distance over their tokens."""
    return torch.stack([error.abs().mean() for error in errors.split([r.tokens for r in responses])]).max().item()


def _largest(rows: Sequence[Row], batch_size: int) -> list[Response]:
    """Responses of the longest rows and the shortest one of all, longest first; every token behind the first counts."""
    longest = sorted((row for row in rows if row.responses), key=lambda row: -sum(len(r.input_ids) for r in row.responses))
    every = sorted((r for row in longest for r in row.responses), key=lambda r: len(r.input_ids))
    responses = [r for row in longest[:batch_size] for r in row.responses] + every[:1] + every[-1:]
    ids = sorted({tuple(r.input_ids) for r in responses if len(r.input_ids) > 1}, key=lambda x: (-len(x), x))
    return [Response(list(x), 1, True) for x in ids]


def _of_batch(model: PreTrainedModel, responses: Sequence[Response], collator: Collator, device: torch.device) -> Tensor:
    """Log-odds of all tokens, one response behind the other."""
    return torch.cat([s.log_odds for s in score(model, [responses], collator, device)])


def _seeing(model: PreTrainedModel, responses: Sequence[Response], device: torch.device) -> Tensor:
    """The same in one long response, where each sees those before it."""
    starts = torch.tensor([0, *(len(r.input_ids) for r in responses)]).cumsum(0)
    whole = _of_batch(model, [Response([i for r in responses for i in r.input_ids], 1, True)], Collator(0), device)
    places = zip(itertools.pairwise(starts.tolist()), responses, strict=True)
    return torch.cat([whole[start + r.prompt_length - 1 : end - 1] for (start, end), r in places])


def _rounds(model: PreTrainedModel) -> bool:
    """Whether products are rounded to fewer digits than float32's."""
    products = [b.matmul.fp32_precision for b in (torch.backends.cuda, torch.backends.mkldnn)]
    return model.dtype.itemsize < 4 or not {"tf32", "bf16"}.isdisjoint(products)


def _why(model: PreTrainedModel, lengths: Sequence[int]) -> str:
    name, config = type(model).__name__, model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    kind = re.search(r"'rope_type': '(longrope|dynamic)'", rope)
    if kind is None:
        return (
            f"{name}: the log-odds of a response depend on the other responses of its batch, packed or padded; "
            "this architecture is not supported."
        )
    found = re.search(r"'original_max_position_embeddings': (\d+)", rope)
    limit = int(found[1]) if found else getattr(config, "max_position_embeddings", None)
    return (
        f"{name}: its {kind[1]} rotary embeddings are chosen by the longest response of a batch, and responses here have "
        f"{min(lengths)} to {max(lengths)} tokens, on both sides of its limit of {limit}; pass --max_length {limit}."
    )


# --- training mode ---------------------------------------------------------------------------------------------------


def switch_off_dropout(model: nn.Module) -> list[str]:
    """Sets the rate of dropout, layer drop and jitter to 0 in all modules; what was not 0 there, by name.

    Policy and reference are then one function in training and evaluation mode. The configuration is left as it is.
    PhiMoE's router_jitter_noise stays: there it is a threshold, which evaluation mode uses, too.
    """
    found: set[str] = set()
    for module in model.modules():
        layer = "dropout" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            random = re.search("drop|jitter", name) or (layer and name == "p")
            if random and name != "router_jitter_noise" and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                found.add("dropout" if name == "p" else name)
    return sorted(found)
