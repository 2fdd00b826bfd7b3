"""What a run writes down: journal, checkpoints, results."""
