"""The history as one HTML page."""


def write(output: str) -> None:
    """Write."""
    print(output)
