"""Every operator, of every provider, beside what a user would call instead."""
