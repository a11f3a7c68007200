"""BNF in a training loop of your own, without full logits: python bnf_train/examples/plain_pytorch.py [MODEL ROWS.jsonl]"""

import sys

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_core import linear_bnf_loss, linear_log_odds
from bnf_train import data, demo

path, file = sys.argv[1:] or (demo.MODEL, demo.PREFERENCES)
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows, _ = data.tokenize(data.read_rows(str(file))[:8], tokenizer, max_length=512, source=str(file))
responses = [response for row in rows for response in row.responses]  # input_ids, prompt_length, preferred
head, optimizer = model.get_output_embeddings().weight, torch.optim.AdamW(model.parameters(), lr=2e-4)


def states(response):
    """The hidden state before each response token, and the token: the state at t - 1 predicts token t."""
    ids, start = torch.tensor([response.input_ids]), response.prompt_length
    return model.base_model(ids).last_hidden_state[0, start - 1 : -1], ids[0, start:]


with torch.no_grad():  # of the reference BNF needs one number a token, computed once
    reference = [linear_log_odds(hidden, head, tokens)[0] for hidden, tokens in map(states, responses)]
for step in range(4):
    shift = {True: [], False: []}  # of the log-likelihood a token
    for response, ref_log_odds in zip(responses, reference, strict=True):  # one a forward pass; bnf_train packs many
        hidden, tokens = states(response)
        coefficient = (1 if response.preferred else -1) / len(tokens) / len(responses)  # eq. 4: s / |y|, mean over the step
        loss, log_odds, _ = linear_bnf_loss(hidden, head, tokens, ref_log_odds, torch.full_like(ref_log_odds, coefficient))
        loss.backward()
        shift[response.preferred].append((logsigmoid(log_odds) - logsigmoid(ref_log_odds)).mean())
    optimizer.step()
    optimizer.zero_grad()
    preferred, dispreferred = (torch.stack(shift[label]).mean() for label in (True, False))
    print(f"step {step}: preferred {preferred:+.3f}, dispreferred {dispreferred:+.3f}")
