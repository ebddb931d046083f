"""Checks of the files of a data set: all of them for a report, some before a training."""
