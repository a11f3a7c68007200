"""Responses of some rows to one batch: token ids packed without padding (or padded), and flat vectors over response tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnf_train.data import Row

# what `forward` takes of a batch; of attention_mask and position_ids a batch has one
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "response_positions", "response_labels")


class Collator:
    """Rows to tensors.

    Packed, all responses stand one behind the other in a single sequence, and positions that start again at 0 tell the
    model where a response begins. Padded, each response is a sequence of its own.

    Logits at position t - 1 predict token t: `response_positions` are the flat (sequence * length + t - 1) places of
    the hidden states that predict the response tokens `response_labels`. Which token pads plays no part.
    """

    def __init__(self, pad_token_id: int, packed: bool = False) -> None:
        self.pad_token_id, self.packed = pad_token_id, packed

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        responses = [response for row in rows for response in row.responses]
        ids = [torch.tensor(r.input_ids) for r in responses]
        lengths = torch.tensor([len(x) for x in ids])
        if self.packed:
            first = lengths.cumsum(0) - lengths
            batch = {
                "input_ids": torch.cat(ids).unsqueeze(0),
                "position_ids": torch.cat([torch.arange(len(x)) for x in ids]).unsqueeze(0),
            }
        else:
            first = torch.arange(len(ids)) * int(lengths.max())
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
            }
        positions = [f + torch.arange(r.prompt_length - 1, len(x) - 1) for f, r, x in zip(first, responses, ids, strict=True)]
        batch |= {
            "response_positions": torch.cat(positions),
            "response_labels": torch.cat([x[r.prompt_length :] for r, x in zip(responses, ids, strict=True)]),
            "response": torch.arange(len(responses)).repeat_interleave(torch.tensor([r.tokens for r in responses])),
            "preferred": torch.tensor([r.preferred for r in responses]),
            "row": torch.tensor([i for i, row in enumerate(rows) for _ in row.responses]),
        }
        if all(r.ref_log_odds is not None for r in responses):
            batch["ref_log_odds"] = torch.cat([r.ref_log_odds for r in responses])  # type: ignore[misc]
        return batch


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that a model with the log-odds head takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
