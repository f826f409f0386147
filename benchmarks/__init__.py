"""Measurements of fastlora against what it replaces: `python -m benchmarks`."""
