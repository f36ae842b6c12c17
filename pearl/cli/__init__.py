"""The command line: ``pearl generate``, ``chat``, ``serve``, ``bench``, ``info``; entry: ``pearl.cli.app:main``."""
