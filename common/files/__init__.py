"""Files written whole or not at all, locks, and what to do when the file system refuses."""
