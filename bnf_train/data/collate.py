"""Responses of some rows to one batch: token ids packed without padding (or padded), and flat vectors over response tokens."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnf_train.data.rows import Row

# what `forward` takes of a batch; of attention_mask and position_ids a batch has one
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "response_positions", "response_labels")

PER_RESPONSE = ("preferred", "row", "paired", "number")
PER_TOKEN = ("response_positions", "response_labels", "response", "ref_log_odds")

WORTH_PACKING = 1.1  # times as much work with padding as without


class Collator:
    """Rows to tensors.

    Packed, all responses stand one behind the other in a single sequence, and positions that start again at 0 tell the
    model where a response begins. Padded, each response is a sequence of its own; so are batches for which attention
    over a packed sequence would cost more than the padding (`worth_packing`).

    Logits at position t - 1 predict token t: `response_positions` are the flat (sequence * length + t - 1) places of
    the hidden states that predict the response tokens `response_labels`. Which token pads plays no part.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, attention_width: float = math.inf) -> None:
        self.pad_token_id, self.packed, self.attention_width = pad_token_id, packed, attention_width

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        responses = [response for row in rows for response in row.responses]
        # rows without responses fill up the batches of the last step: one token, and nothing to predict
        ids = [torch.tensor(r.input_ids) for r in responses] or [torch.tensor([self.pad_token_id])]
        lengths = torch.tensor([len(x) for x in ids])
        longest = int(lengths.max())
        if self.packed and worth_packing(lengths.tolist(), self.attention_width):
            first = lengths.cumsum(0) - lengths
            batch = {
                "input_ids": torch.cat(ids).unsqueeze(0),
                "position_ids": torch.cat([torch.arange(len(x)) for x in ids]).unsqueeze(0),
            }
        else:
            first = torch.arange(len(ids)) * longest
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long(),
            }
        starts = [int(f) + r.prompt_length for f, r in zip(first, responses, strict=False)]
        tokens = [r.tokens for r in responses]
        batch |= {
            "response_positions": _joined([torch.arange(s - 1, s - 1 + n) for s, n in zip(starts, tokens, strict=True)]),
            "response_labels": _joined([x[r.prompt_length :] for r, x in zip(responses, ids, strict=False)]),
            "response": torch.arange(len(responses)).repeat_interleave(torch.tensor(tokens, dtype=torch.long)),
            "preferred": torch.tensor([r.preferred for r in responses], dtype=torch.bool),
            "row": torch.tensor([i for i, row in enumerate(rows) for _ in row.responses], dtype=torch.long),
            "paired": torch.tensor([len(row.responses) == 2 for row in rows for _ in row.responses], dtype=torch.bool),
            "number": torch.tensor([row.number for row in rows for _ in row.responses], dtype=torch.long),
        }
        if all(r.ref_log_odds is not None for r in responses):
            batch["ref_log_odds"] = _joined([r.ref_log_odds for r in responses], torch.float32)
        return batch


def _joined(parts: Sequence[Tensor | None], dtype: torch.dtype = torch.long) -> Tensor:
    return torch.cat([part for part in parts if part is not None] or [torch.empty(0, dtype=dtype)])


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that a model with the log-odds head takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def passes(batch: dict[str, Tensor], most_tokens: float, whole_rows: bool = False) -> list[dict[str, Tensor]]:
    """A packed batch in parts of at most `most_tokens` tokens, in its order; a padded one as it is.

    A part is a batch with one response at least, or, with `whole_rows`, one row.
    """
    if "position_ids" not in batch or batch["input_ids"].numel() <= most_tokens or len(batch["row"]) < 2:
        return [batch]
    places = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].numel()]
    row = batch["row"].tolist()
    # responses in front of which the batch may be cut
    starts = [i for i in range(len(row)) if not whole_rows or i == 0 or row[i] != row[i - 1]] + [len(row)]
    cuts = [0]
    for start, end in itertools.pairwise(starts):
        if start > cuts[-1] and places[end] - places[cuts[-1]] > most_tokens:
            cuts.append(start)
    return [_part(batch, places, first, last) for first, last in itertools.pairwise([*cuts, len(row)])]


def _part(batch: Mapping[str, Tensor], places: Sequence[int], first: int, last: int) -> dict[str, Tensor]:
    """The responses `first` to `last` (exclusive) of a packed batch; `places` are their first positions, and the end."""
    start, end = places[first], places[last]
    tokens = (batch["response"] >= first) & (batch["response"] < last)
    part = {name: batch[name][:, start:end] for name in ("input_ids", "position_ids")}
    part |= {name: batch[name][first:last] for name in PER_RESPONSE}
    part |= {name: batch[name][tokens] for name in PER_TOKEN if name in batch}
    part["response_positions"] = part["response_positions"] - start
    part["response"] = part["response"] - first
    return part


def worth_packing(lengths: Sequence[int], attention_width: float) -> bool:
    """Whether sequences of these lengths are less work packed than padded to the longest.

    work = positions + sum over sequences of length^2 / attention_width, in units of a position's work outside attention.
    """

    def work(sequences: Sequence[int]) -> float:
        return sum(n + n * n / attention_width for n in sequences)

    return work([max(lengths)] * len(lengths)) > WORTH_PACKING * work([sum(lengths)])
