"""Several objectives from one starting point: `python -m bnf_train.compare`."""
