"""Which image is latest, and how it becomes so: bump, nightly, promote, prune, push."""
