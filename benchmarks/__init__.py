"""Measurements: `python -m benchmarks --help`. Nothing imports this package."""
