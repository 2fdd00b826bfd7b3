"""Image files: found, read in one orientation, written in the geometry of their source."""
