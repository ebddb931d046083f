"""Readers of what annotation tools export: files -> pictures with labelled shapes."""
