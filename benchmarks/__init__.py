"""Benchmarks: ratios of times in one run, ``python -m benchmarks.NAME [--quick] [--json]``."""
