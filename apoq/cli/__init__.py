"""The command line: ``apoq``, and ``python -m apoq``."""

import click

from apoq import HAS_LIBPQ

main: click.Group
if HAS_LIBPQ:
    from apoq.cli.group import main
else:
    from apoq.cli.without_libpq import main

__all__ = ["main"]
