"""LoRA and its relatives: files in every dialect, what they mean, and how they reach a model's layers."""
