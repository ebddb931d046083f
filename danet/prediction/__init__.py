"""Predictions for pictures without labels: where they come from, what is written."""
