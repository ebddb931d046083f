"""Checks and predictions before a run starts: settings, memory, FLOPs."""
