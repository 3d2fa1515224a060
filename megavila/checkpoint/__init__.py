"""Saving and resuming training state: whole, verified, or not at all."""
