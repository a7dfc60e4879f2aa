"""Checkpoints of picollm and nanochat: their files, their tokenizer, their model."""
