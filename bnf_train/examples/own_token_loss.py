"""A token loss of your own, no gradient by hand: python bnf_train/examples/own_token_loss.py [MODEL ROWS.jsonl]"""

import sys

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_core import linear_token_loss
from bnf_train import data, demo

path, file = sys.argv[1:] or (demo.MODEL, demo.PREFERENCES)
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows, _ = data.tokenize(data.read_rows(str(file))[:8], tokenizer, max_length=512, source=str(file))
responses = [response for row in rows for response in row.responses]  # input_ids, prompt_length, preferred
head, optimizer = model.get_output_embeddings().weight, torch.optim.AdamW(model.parameters(), lr=2e-4)


def unlikelihood(log_odds, preferred, coefficient):
    """-log pi where preferred, -log(1 - pi) where not (Welleck et al. 2020); log-odds keep every digit of both."""
    return -coefficient * torch.where(preferred, logsigmoid(log_odds), logsigmoid(-log_odds))


for step in range(4):
    logps = {True: [], False: []}  # log-likelihood a token
    for response in responses:  # one a forward pass; bnf_train packs many
        ids, start = torch.tensor([response.input_ids]), response.prompt_length
        hidden, tokens = model.base_model(ids).last_hidden_state[0, start - 1 : -1], ids[0, start:]  # t - 1 predicts t
        preferred = torch.full(tokens.shape, response.preferred)
        coefficient = torch.full(tokens.shape, 1 / len(tokens) / len(responses))  # a mean over tokens, then over responses
        loss, log_odds, _ = linear_token_loss(hidden, head, tokens, unlikelihood, preferred, coefficient)
        loss.backward()
        logps[response.preferred].append(logsigmoid(log_odds).mean())
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: preferred {torch.stack(logps[True]).mean():.3f}, dispreferred {torch.stack(logps[False]).mean():.3f}")
