"""What protects a hospital: its own policy, approved code, and the one door with its ledger."""
