"""Image files: finding, reading in a canonical orientation, writing in the geometry of a source."""
