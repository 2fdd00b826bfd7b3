"""The coordinator of a federation of real hospitals: kits, server, runs."""
