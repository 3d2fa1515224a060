"""The `megavila` command."""
