"""Exit codes. That of Ctrl-C is ``pearl.interrupts.INTERRUPTED``; a signal that ends the process is reported by the
shell."""

REFUSED = 2  # what a user asked for cannot be done
FAILED = 1  # the system did not do it: a full disk, a closed output
