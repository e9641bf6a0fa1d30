"""The command line: ``apoq``, and ``python -m apoq``."""

from apoq.cli.group import main

__all__ = ["main"]
