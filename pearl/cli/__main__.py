"""``python -m pearl.cli`` is ``pearl``."""

from pearl.cli.app import main

main()
