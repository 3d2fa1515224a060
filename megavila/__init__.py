"""Megavila: reinforcement learning of vision-language models on long videos, on Megatron-core."""

__version__ = "0.1.0"
