"""Training with the BNF loss on transformers and Accelerate: `python -m bnf_train`."""
