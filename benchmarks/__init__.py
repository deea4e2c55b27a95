"""Ratios measured in one run: ``python -m benchmarks.NAME [--quick] [--json]``."""
