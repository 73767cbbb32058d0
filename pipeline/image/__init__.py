"""Build the image and describe what is in it."""
