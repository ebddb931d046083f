"""Overlays, legends, attention maps, charts and reports."""
