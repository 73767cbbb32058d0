"""Helpers of the command lines."""

import argparse
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that exits with 64 (EX_USAGE) on a wrong command line."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit."""
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{self.prog}: error: {message}\n")


def printable(text: str) -> str:
    """Return ``text`` with ``?`` for what could control a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries, which may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
