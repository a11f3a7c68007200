"""Responses of some rows to one batch: token ids packed without padding (or padded), and flat vectors over response tokens."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnf_train.data.rows import Response, Row

# what `forward` takes of a batch: a padded one has attention_mask, a packed one position_ids and cu_seq_lens
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "response_positions", "response_labels")

PER_RESPONSE = ("preferred", "row", "paired", "number", "score")
PER_TOKEN = ("response_positions", "response_labels", "response", "ref_log_odds", "weight")

WORTH_PACKING = 1.1  # times as much work with padding as without


class Collator:
    """Rows to tensors.

    Packed, all responses stand one behind the other in a single sequence. `cu_seq_lens` holds where they begin and end,
    for varlen attention; positions start again at 0 with each. Padded, each response is a sequence of its own; so are
    batches for which attention over a packed sequence would cost more than the padding (`worth_packing`).

    Logits at position t - 1 predict token t: `response_positions` are the flat (sequence * length + t - 1) places of
    the hidden states that predict the response tokens `response_labels`: those that count, if a response has `weights`;
    weights other than 0 and 1 are the batch's `weight`. Which token pads plays no part.

    Example:
      >>> from bnf_train.data import Response
      >>> row = Row("", [Response([5, 6, 7, 8, 9], 3, True), Response([5, 2], 1, False)])
      >>> for name, value in Collator(pad_token_id=0, packed=True)([row]).items():
      ...     print(name, value.tolist() if isinstance(value, torch.Tensor) else value)
      input_ids [[5, 6, 7, 8, 9, 5, 2]]
      position_ids [[0, 1, 2, 3, 4, 0, 1]]
      cu_seq_lens [0, 5, 7]
      max_length 5
      response_positions [2, 3, 5]
      response_labels [8, 9, 2]
      response [0, 0, 1]
      preferred [True, False]
      row [0, 0]
      paired [True, True]
      score [1.0, -1.0]
      number [0, 0]
    """

    def __init__(self, pad_token_id: int, packed: bool = False, attention_width: float = math.inf) -> None:
        self.pad_token_id, self.packed, self.attention_width = pad_token_id, packed, attention_width

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        responses = [response for row in rows for response in row.responses]
        # rows without responses fill up the batches of the last step: one token, and nothing to predict
        ids = [torch.tensor(r.input_ids) for r in responses] or [torch.tensor([self.pad_token_id])]
        lengths = torch.tensor([len(x) for x in ids])
        longest = int(lengths.max())
        if self.packed and worth_packing(lengths.tolist(), self.attention_width):
            first = lengths.cumsum(0) - lengths
            batch = packed(ids)
        else:
            first = torch.arange(len(ids)) * longest
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long(),
            }
        counted = [_counted(r) for r in responses]
        tokens = [len(places) for places in counted]
        batch |= {
            "response_positions": _joined([f - 1 + places for f, places in zip(first, counted, strict=False)]),
            "response_labels": _joined([x[places] for x, places in zip(ids, counted, strict=False)]),
            "response": torch.arange(len(responses)).repeat_interleave(torch.tensor(tokens, dtype=torch.long)),
            "preferred": torch.tensor([r.preferred for r in responses], dtype=torch.bool),
            "row": torch.tensor([i for i, row in enumerate(rows) for _ in row.responses], dtype=torch.long),
            "paired": torch.tensor([row.pair for row in rows for _ in row.responses], dtype=torch.bool),
            "score": torch.tensor([r.score or (1.0 if r.preferred else -1.0) for r in responses]),
            "number": torch.tensor([row.number for row in rows for _ in row.responses], dtype=torch.long),
        }
        if all(r.ref_log_odds is not None for r in responses):
            batch["ref_log_odds"] = _joined([r.ref_log_odds for r in responses], torch.float32)
        if any(weight not in (0, 1) for r in responses for weight in r.weights or ()):
            batch["weight"] = torch.tensor([weight for r in responses for weight in r.counted_weights])
        return batch


def _counted(response: Response) -> Tensor:
    """Places of the tokens that count."""
    if response.weights is None:
        return torch.arange(response.prompt_length, len(response.input_ids))
    return torch.tensor(response.counted, dtype=torch.long)


def _joined(parts: Sequence[Tensor | None], dtype: torch.dtype = torch.long) -> Tensor:
    return torch.cat([part for part in parts if part is not None] or [torch.empty(0, dtype=dtype)])


def packed(ids: Sequence[Tensor]) -> dict[str, Any]:
    """Sequences of token ids, (length,) each, one behind the other in a single one, and where each begins and ends."""
    lengths = torch.tensor([len(x) for x in ids])
    return {
        "input_ids": torch.cat(list(ids)).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(x), device=x.device) for x in ids]).unsqueeze(0),
        "cu_seq_lens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(ids[0].device, torch.int32),
        "max_length": int(lengths.max()),
    }


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model with the log-odds head takes; lengths under transformers' names for them."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if "cu_seq_lens" in batch:
        inputs |= {"cu_seq_lens_q": batch["cu_seq_lens"], "cu_seq_lens_k": batch["cu_seq_lens"]}
        inputs |= {"max_length_q": batch["max_length"], "max_length_k": batch["max_length"]}
    return inputs


def passes(batch: dict[str, Any], most_tokens: float, whole_rows: bool = False) -> list[dict[str, Any]]:
    """A packed batch in parts of at most `most_tokens` tokens, in its order; a padded one as it is.

    A part is a batch with one response at least, or, with `whole_rows`, one row.
    """
    if "cu_seq_lens" not in batch or batch["input_ids"].numel() <= most_tokens or len(batch["row"]) < 2:
        return [batch]
    places = batch["cu_seq_lens"].tolist()
    row = batch["row"].tolist()
    # responses in front of which the batch may be cut
    starts = [i for i in range(len(row)) if not whole_rows or i == 0 or row[i] != row[i - 1]] + [len(row)]
    cuts = [0]
    for start, end in itertools.pairwise(starts):
        if start > cuts[-1] and places[end] - places[cuts[-1]] > most_tokens:
            cuts.append(start)
    return [_part(batch, places, first, last) for first, last in itertools.pairwise([*cuts, len(row)])]


def _part(batch: Mapping[str, Any], places: Sequence[int], first: int, last: int) -> dict[str, Any]:
    """The responses `first` to `last` (exclusive) of a packed batch; `places` are its cu_seq_lens."""
    start, end = places[first], places[last]
    tokens = (batch["response"] >= first) & (batch["response"] < last)
    part = {name: batch[name][:, start:end] for name in ("input_ids", "position_ids")}
    part |= {name: batch[name][first:last] for name in PER_RESPONSE}
    part |= {name: batch[name][tokens] for name in PER_TOKEN if name in batch}
    part["cu_seq_lens"] = batch["cu_seq_lens"][first : last + 1] - start
    part["max_length"] = max(b - a for a, b in itertools.pairwise(places[first : last + 1]))
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
