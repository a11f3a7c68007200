"""What a run would take, before it is run: `python -m bnf_train.plan`."""
