"""A network outside of this project: other formats, a folder to share, a model card, a hub."""
