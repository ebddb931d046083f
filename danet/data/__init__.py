"""From samples to batches: augmentation, order, collation."""
