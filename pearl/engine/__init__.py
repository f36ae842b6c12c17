"""The engine thread: requests, scheduling, verification, output."""
