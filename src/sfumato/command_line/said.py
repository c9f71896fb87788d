"""What a command says beside its result."""

import sys


def say(*lines: str) -> None:
    """Lines for the person, on stderr: on stdout is the result alone."""
    for line in lines:
        print(line, file=sys.stderr)
