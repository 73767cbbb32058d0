"""Start an image, run the probes, and report."""
