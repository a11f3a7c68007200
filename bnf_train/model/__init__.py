"""A causal language model with the log-odds head: load, attach, adapt, score, generate."""
