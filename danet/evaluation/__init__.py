"""Metrics, inference modes, and the evaluation loop."""
