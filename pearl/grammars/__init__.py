"""Grammars that constrain outputs: compiled once (``compiler``), then followed token by token."""

from pearl.grammars.grammar import Grammar, Matcher

__all__ = ["Grammar", "Matcher"]
