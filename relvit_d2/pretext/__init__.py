"""Pretext tasks as tensor code: views, patch layouts, targets, heads and losses."""
