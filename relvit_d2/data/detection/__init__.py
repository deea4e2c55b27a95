"""Detection data sets: formats, the catalog, custom data, the mapper."""
