"""Using a trained model on images of this hospital; nothing leaves it."""
