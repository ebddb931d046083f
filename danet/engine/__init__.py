"""Training: processes, schedule, optimizer, checkpoints, log, and the trainer itself."""
