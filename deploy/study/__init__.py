"""Studies on one machine or cluster: planning, execution and record of their cells."""
