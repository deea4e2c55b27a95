"""Readers, catalogs, mappers and loaders."""
