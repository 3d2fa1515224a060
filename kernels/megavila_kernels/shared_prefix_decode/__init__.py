"""Decoding attention of several responses that share prompts: a prompt's keys and values are read once."""

from megavila_kernels.shared_prefix_decode.groups import DecodeGroups
from megavila_kernels.shared_prefix_decode.interface import shared_prefix_decode

__all__ = ["DecodeGroups", "shared_prefix_decode"]
