"""BNF in a trainer of TRL (not a dependency; written for 1.16): python bnf_train/examples/trl_trainer.py [MODEL ROWS.jsonl]"""

import sys

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import KTOConfig, KTOTrainer

from bnf_core import TokenBatch, bnf, token_log_odds
from bnf_train import data, demo

path, file = sys.argv[1:] or (demo.MODEL, demo.PREFERENCES)


class BNFTrainer(KTOTrainer):  # its rows (prompt, completion, label or prompt, chosen, rejected), its reference; another loss
    def response_tokens(self, model, inputs):
        row, place = inputs["completion_mask"][:, 1:].nonzero(as_tuple=True)  # logits at t - 1 predict token t
        tokens, sequences = inputs["input_ids"][:, 1:][row, place], {k: inputs[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_log_odds, _ = token_log_odds(self.ref_model(**sequences).logits[row, place], tokens)
        log_odds, entropy = token_log_odds(model(**sequences).logits[row, place], tokens)
        return log_odds, TokenBatch(row, inputs["label"], ref_log_odds=ref_log_odds, entropy=entropy)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = bnf(*self.response_tokens(model, inputs)).mean()  # KTOTrainer averages over the forward passes of a step
        return (loss, {}) if return_outputs else loss


chat = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
rows = [{k: [{"role": chat[k], "content": v}] if k in chat else v for k, v in r.items()} for r in data.read_rows(str(file))[:8]]
options = {"learning_rate": 2e-4, "num_train_epochs": 4, "save_strategy": "no", "bf16": False}
args = KTOConfig("runs/example", loss_type="apo_zero_unpaired", per_device_train_batch_size=8, **options)  # no KL pass
trainer = BNFTrainer(str(path), args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
log_odds, batch = trainer.response_tokens(trainer.model, next(iter(trainer.get_train_dataloader())))
shift = batch.mean(logsigmoid(log_odds) - logsigmoid(batch.ref_log_odds))  # of the log-likelihood a token
print(f"preferred {shift[batch.preferred].mean():+.3f}, dispreferred {shift[~batch.preferred].mean():+.3f}")
