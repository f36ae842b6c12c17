"""The host's time in a round: scheduling, packing, hand-over, verdict, bookkeeping, text."""
