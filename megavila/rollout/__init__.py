"""Generating responses: the engine protocol, and the engine that runs on the training model itself."""
