"""Log-odds of every response token under the reference: one pass before training, 4 bytes a token, no second model."""

from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bnf_train.collate import Collator, model_inputs
from bnf_train.data import Row


@torch.no_grad()
def add_ref_log_odds(
    model: PreTrainedModel, rows: list[Row], collator: Collator, device: torch.device, bf16: bool, batch_size: int
) -> None:
    """Fill in `ref_log_odds` of every response from `model`, which is the reference before its first step.

    The same forward, dtype and head as in training, so that w = 1 up to the noise of another padding. Rows go in
    order of length, which pads least.
    """
    model.to(device).eval()
    order: Any = sorted(rows, key=lambda row: max(len(r.input_ids) for r in row.responses), reverse=True)
    loader: Any = DataLoader(order, batch_size, collate_fn=lambda rows: (rows, collator(rows)))
    for batch_rows, batch in tqdm(loader, desc="reference log-odds"):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            log_odds, _ = model(**{name: value.to(device) for name, value in model_inputs(batch).items()})
        responses = [response for row in batch_rows for response in row.responses]
        for response, values in zip(responses, log_odds.cpu().split([r.tokens for r in responses]), strict=True):
            response.ref_log_odds = values.clone()
