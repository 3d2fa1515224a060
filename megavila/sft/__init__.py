"""Supervised fine-tuning on long chains of thought."""
