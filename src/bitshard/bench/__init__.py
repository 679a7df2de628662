"""Benchmarks: each checks its results before it times them, and refuses to time a red check."""
