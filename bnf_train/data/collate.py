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

    With `share_prompts`, neighbours with one prompt are packed as prompt, response, response, ...: what their token ids have
    in common at their beginning stands there once. `spans` (responses, 4) then holds where each one's shared part and its own
    part begin and end, and positions go on from the shared part's in each.

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

    def __init__(
        self, pad_token_id: int, packed: bool = False, attention_width: float = math.inf, share_prompts: bool = False
    ) -> None:
        self.pad_token_id, self.packed, self.attention_width = pad_token_id, packed, attention_width
        self.share_prompts = share_prompts and packed

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        responses = [response for row in rows for response in row.responses]
        # rows without responses fill up the batches of the last step: one token, and nothing to predict
        ids = [torch.tensor(r.input_ids) for r in responses] or [torch.tensor([self.pad_token_id])]
        lengths = torch.tensor([len(x) for x in ids])
        longest = int(lengths.max())
        counted = [_counted(r) for r in responses]
        if self.share_prompts and (shared := shared_lengths(responses)) and any(shared):
            batch, places = packed_behind_prompts(ids, shared)
        elif self.packed and worth_packing(lengths.tolist(), self.attention_width):
            batch, places = (
                packed(ids),
                [first + torch.arange(n) for first, n in zip(lengths.cumsum(0) - lengths, lengths, strict=True)],
            )
        else:
            places = [i * longest + torch.arange(n) for i, n in enumerate(lengths)]
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long(),
            }
        tokens = [len(at) for at in counted]
        batch |= {
            "response_positions": _joined([where[at - 1] for where, at in zip(places, counted, strict=False)]),
            "response_labels": _joined([x[at] for x, at in zip(ids, counted, strict=False)]),
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
        if mismatched := [r.mismatched for r in responses if r.mismatched is not None]:
            batch["mismatched"] = self([Row("", [r]) for r in mismatched])
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


def shared_lengths(responses: Sequence[Response]) -> list[int]:
    """How many tokens at its beginning each response has in common with a neighbour of the same prompt.

    >>> pair = Response([5, 6, 7, 8, 9], 2, True), Response([5, 6, 7, 3], 2, False)
    >>> shared_lengths([*pair, Response([5, 6, 1], 1, True)])
    [3, 3, 0]
    """
    shared = []
    for _, same in itertools.groupby(responses, lambda r: r.input_ids[: r.prompt_length]):
        together = [r.input_ids for r in same]
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*together, strict=False))
        # no response without a token of its own
        common = min(sum(1 for _ in alike), min(map(len, together)) - 1) if len(together) > 1 else 0
        shared += [common] * len(together)
    return shared


def spared(rows: Sequence[Row], batch_size: int) -> list[int]:
    """Lengths of the prompts that a pass over the rows, `batch_size` at a time, does not compute again where they are shared.

    >>> pair = Row("", [Response([5, 6, 7, 8], 2, True), Response([5, 6, 3], 2, False)])
    >>> spared([pair, pair], 1)
    [2, 2]
    """
    lengths = []
    for at in range(0, len(rows), batch_size):
        responses = [r for row in rows[at : at + batch_size] for r in row.responses]
        shared = zip(responses, shared_lengths(responses), strict=True)
        for _, group in itertools.groupby(shared, lambda x: x[0].input_ids[: x[1]]):
            lengths += [length for _, length in list(group)[1:] if length]
    return lengths


def by_prompt(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows with the same prompt, in the order of the first of each; a row without responses stands alone."""
    groups: dict[tuple[int, ...] | int, list[int]] = {}
    for place, row in enumerate(rows):
        prompt = tuple(row.responses[0].input_ids[: row.responses[0].prompt_length]) if row.responses else place
        groups.setdefault(prompt, []).append(place)
    return list(groups.values())


def packed_behind_prompts(ids: Sequence[Tensor], shared: Sequence[int]) -> tuple[dict[str, Any], list[Tensor]]:
    """Sequences of token ids in one, what neighbours share (`shared_lengths`) once; and where each one's tokens stand in it."""
    parts, positions, spans, places, end, prompt = [], [], [], [], 0, (0, 0)
    for i, (x, length) in enumerate(zip(ids, shared, strict=True)):
        if not length:
            prompt = (end, end)
        elif i == 0 or shared[i - 1] != length or not torch.equal(ids[i - 1][:length], x[:length]):
            prompt, end = (end, end + length), end + length
            parts.append(x[:length])
            positions.append(torch.arange(length))
        parts.append(x[length:])
        positions.append(torch.arange(length, len(x)))
        spans.append([*prompt, end, end + len(x) - length])
        places.append(torch.cat([torch.arange(*prompt), torch.arange(end, end + len(x) - length)]))
        end += len(x) - length
    batch = {"input_ids": torch.cat(parts).unsqueeze(0), "position_ids": torch.cat(positions).unsqueeze(0)}
    return batch | {"spans": torch.tensor(spans)}, places


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model with the log-odds head takes; lengths under transformers' names for them."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if "cu_seq_lens" in batch:
        inputs |= {"cu_seq_lens_q": batch["cu_seq_lens"], "cu_seq_lens_k": batch["cu_seq_lens"]}
        inputs |= {"max_length_q": batch["max_length"], "max_length_k": batch["max_length"]}
    if "spans" in batch:
        # a mask with four axes is taken as it is: the model makes none of its own, which would not be right
        inputs |= {"packed_spans": batch["spans"], "attention_mask": batch["spans"].new_ones(1, 1, 1, 1, dtype=torch.bool)}
    return inputs


def logical_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch's responses with their prompts, as if each had its own; no padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["spans"].view(-1, 2).diff().sum()) if "spans" in batch else int(batch["input_ids"].numel())


def passes(batch: dict[str, Any], most_tokens: float, whole_rows: bool = False) -> list[dict[str, Any]]:
    """A packed batch in parts of at most `most_tokens` tokens, in its order; a padded one as it is.

    A part is a batch with one response at least, or, with `whole_rows`, one row.
    """
    packed = "cu_seq_lens" in batch or "spans" in batch
    if not packed or batch["input_ids"].numel() <= most_tokens or len(batch["row"]) < 2:
        return [batch]
    spans, row = _spans(batch), batch["row"].tolist()
    # responses in front of which the batch may be cut
    starts = [i for i in range(len(row)) if not whole_rows or i == 0 or row[i] != row[i - 1]] + [len(row)]
    cuts = [0]
    for start, end in itertools.pairwise(starts):
        if start > cuts[-1] and len(_places(spans[cuts[-1] : end])) > most_tokens:
            cuts.append(start)
    return [_part(batch, spans, first, last) for first, last in itertools.pairwise([*cuts, len(row)])]


Span = list[int]  # where what a response shares begins and ends, and what is its own


def _spans(batch: Mapping[str, Any]) -> list[Span]:
    if "spans" in batch:
        spans: list[Span] = batch["spans"].tolist()
        return spans
    return [[start, start, start, end] for start, end in itertools.pairwise(batch["cu_seq_lens"].tolist())]


def _places(spans: Sequence[Span]) -> list[int]:
    """Places of these responses' tokens, what neighbours share once."""
    places: list[int] = []
    for i, (prompt, prompt_end, start, end) in enumerate(spans):
        if i == 0 or spans[i - 1][:2] != [prompt, prompt_end]:
            places += range(prompt, prompt_end)
        places += range(start, end)
    return places


def _part(batch: Mapping[str, Any], spans: Sequence[Span], first: int, last: int) -> dict[str, Any]:
    """The responses `first` to `last` (exclusive) of a packed batch."""
    tokens = (batch["response"] >= first) & (batch["response"] < last)
    places = torch.tensor(_places(spans[first:last]), device=batch["input_ids"].device)
    moved = torch.full((batch["input_ids"].numel() + 1,), -1, device=places.device)
    moved[places] = torch.arange(len(places), device=places.device)
    part = {name: batch[name][:, places] for name in ("input_ids", "position_ids")}
    part |= {name: batch[name][first:last] for name in PER_RESPONSE}
    part |= {name: batch[name][tokens] for name in PER_TOKEN if name in batch}
    part["response_positions"] = moved[part["response_positions"]]
    part["response"] = part["response"] - first
    if "spans" in batch:
        edges = batch["spans"][first:last]
        lengths = edges.view(-1, 2).diff().view(-1, 2)
        begins = moved[edges[:, ::2]].masked_fill(lengths == 0, 0)
        part["spans"] = torch.stack([begins, begins + lengths], dim=2).flatten(1)
    else:
        part["cu_seq_lens"] = batch["cu_seq_lens"][first : last + 1] - spans[first][2]
        part["max_length"] = max(end - start for _, _, start, end in spans[first:last])
    return part


def worth_packing(lengths: Sequence[int], attention_width: float) -> bool:
    """Whether sequences of these lengths are less work packed than padded to the longest.

    work = positions + sum over sequences of length^2 / attention_width, in units of a position's work outside attention.
    """

    def work(sequences: Sequence[int]) -> float:
        return sum(n + n * n / attention_width for n in sequences)

    return work([max(lengths)] * len(lengths)) > WORTH_PACKING * work([sum(lengths)])
