"""BNF in transformers.Trainer by compute_loss_func: python bnf_train/examples/transformers_trainer.py [MODEL ROWS.jsonl]"""

import sys

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bnf_core import TokenBatch, bnf, token_log_odds
from bnf_train import data, demo

path, file = sys.argv[1:] or (demo.MODEL, demo.PREFERENCES)
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows, _ = data.tokenize(data.read_rows(str(file))[:8], tokenizer, max_length=512, source=str(file))
responses = [response for row in rows for response in row.responses]  # input_ids, prompt_length, preferred
ids = pad_sequence([torch.tensor(r.input_ids) for r in responses], batch_first=True)  # on the right, where no token looks
targets = [torch.tensor([-100] * r.prompt_length + r.input_ids[r.prompt_length :]) for r in responses]


def bnf_loss(outputs, labels, num_items_in_batch):  # labels: -100 and the response's number, of which Trainer counts one each
    n = labels[:, 1]
    row, place = (targets[n] != -100).nonzero(as_tuple=True)
    log_odds, entropy = token_log_odds(outputs.logits[row, place], targets[n][row, place])
    batch = TokenBatch(row, preferred[n], ref_log_odds=reference[n][row, place], entropy=entropy)
    return bnf(log_odds, batch).sum() / num_items_in_batch  # the mean over all responses of the step, as in eq. 4


options = {"learning_rate": 2e-4, "num_train_epochs": 4, "logging_steps": 1, "save_strategy": "no"}
args = TrainingArguments("runs/example", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
dataset = [{"input_ids": x, "labels": torch.tensor([-100, n])} for n, x in enumerate(ids)]
trainer = Trainer(model, args, train_dataset=dataset, compute_loss_func=bnf_loss)  # moves the model to its device
targets = pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:].to(args.device)  # logits at t - 1 predict t
preferred = torch.tensor([r.preferred for r in responses], device=args.device)
reference, _ = token_log_odds(model(ids.to(args.device)).logits[:, :-1].detach(), targets)  # one number a token, once
trainer.train()
after, _ = token_log_odds(model(ids.to(args.device)).logits[:, :-1].detach(), targets)
shift = (logsigmoid(after) - logsigmoid(reference)).sum(1) / (targets != -100).sum(1)  # of the log-likelihood a token
print(f"preferred {shift[preferred].mean():+.3f}, dispreferred {shift[~preferred].mean():+.3f}")
