"""The command line: ``pearl generate``, ``pearl chat``, ``pearl info``. The entry point is ``pearl.cli.app:main``."""
