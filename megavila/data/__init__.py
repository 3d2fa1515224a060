"""Rows, templates, tokenizers and multimodal prompts."""
