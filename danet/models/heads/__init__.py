"""Heads: feature map -> logits by name."""
