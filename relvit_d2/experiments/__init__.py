"""Rows of the papers' tables as runs, and their statistics."""
