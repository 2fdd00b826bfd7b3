"""Prediction with a trained model on a hospital's own images; nothing is sent."""
