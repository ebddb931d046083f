"""Pictures of any number of bands and bits are read, normalised and shown as they are stored."""
