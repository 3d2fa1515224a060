"""Measurements: everything is a ratio to a baseline or a peer in the same run."""
