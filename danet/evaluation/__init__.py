"""Scores: the confusion matrix, ways of running a network over an image, and the loop."""
