"""The training loop on transformers.Trainer, its metrics, checkpoints and distributed set-up."""
