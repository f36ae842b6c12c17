"""An EAGLE-3 head for a given target: its data, its training, its files."""
