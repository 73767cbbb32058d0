"""Modules of what runs inside the image; the commands are one folder up."""
