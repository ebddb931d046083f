"""Pictures for people: overlays, legends, attention maps."""
