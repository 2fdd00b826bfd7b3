"""One hospital of a real federation: its node, its checks, what it approves and what left it."""
