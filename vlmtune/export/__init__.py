"""Writes a trained model as the Hugging Face folder that other programs load."""
