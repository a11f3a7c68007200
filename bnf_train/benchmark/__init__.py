"""python -m bnf_train.benchmark."""
