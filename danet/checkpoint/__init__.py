"""Files of weights: reading them safely, and writing those of a run."""
