"""The schema of the configs, and how one becomes objects."""
