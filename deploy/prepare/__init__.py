"""Convert downloaded or own images into the canonical folder that every other command reads."""
