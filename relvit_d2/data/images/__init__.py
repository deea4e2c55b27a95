"""Images: decoding, archives, folders, batches."""
