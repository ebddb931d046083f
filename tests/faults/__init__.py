"""Faults that a training must survive; docs/reliability.md lists them by number."""
