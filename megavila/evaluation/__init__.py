"""Benchmarks, answer extraction and category scores."""
