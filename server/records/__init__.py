"""The files of a run: journal, checkpoints, events, results and model card."""
