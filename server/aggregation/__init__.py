"""What the coordinator merges: weights, class statistics, amplitudes."""
