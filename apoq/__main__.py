"""``python -m apoq``: the command line."""

from apoq.cli import main

main(prog_name="python -m apoq")
