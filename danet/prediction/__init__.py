"""Prediction of pictures without labels: sources and results."""
