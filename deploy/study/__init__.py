"""Studies on one machine or cluster: which cells, how they run, what is recorded."""
