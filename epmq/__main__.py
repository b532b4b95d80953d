"""``python -m epmq``."""

from epmq.cli import main

main()
