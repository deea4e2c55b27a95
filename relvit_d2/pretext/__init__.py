"""Patch layouts to targets, views, heads and losses, as pure tensor code."""
