"""Imports what a training needs, once, for all processes forked afterwards."""

from faults import driver, plants  # noqa: F401
