"""Setup, doctor and the checks of the repository."""
