"""What every layer uses: errors, registries, files, paths, randomness, hardware."""
