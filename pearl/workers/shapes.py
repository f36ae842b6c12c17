"""Which shapes captured forwards have: so few that all that come up can be captured once and kept.

What pads a shape must cost next to nothing: rows up to 64 ride in the tiles that a small batch computes anyway, while
the weights stream by; a sequence without rows, and keys behind a sequence's end, are blocks that leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_SHORTEST = 1024  # tokens: shorter contexts are two splits of keys or less
_GROWTH = 4  # of sequences, and of the tables' width, from one size to the next


class BatchShape(NamedTuple):
    """What a captured forward is fixed to. Its arrays have one sequence more, which takes the padding rows."""

    rows: int
    sequences: int
    pages: int  # columns of the block tables


def row_bucket(count: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, ... that holds ``count``.

    From 64 on rows take their own time: a fifth at most is padding.
    """
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = octave if count <= 16 else octave // 2 if count <= 64 else octave // 4
    return -(-count // step) * step


@dataclass(frozen=True)
class ShapeLimits:
    """The largest of each, and pages of ``page_size`` tokens."""

    rows: int
    rows_per_sequence: int
    sequences: int
    pages: int
    page_size: int

    def shape(self, rows: int, sequences: int, pages: int) -> BatchShape:
        """The smallest that holds so many. A sequence may be longer than the limit says."""
        rows = row_bucket(rows)
        columns = max(_grown(pages, max(1, _SHORTEST // self.page_size), self.pages), -(-rows // self.page_size))
        return BatchShape(rows, _grown(sequences, 1, self.sequences), columns)  # padding's positions need pages too

    def rows_of_a_sequence(self, rows: int, sequences: int) -> int:
        """The most that sequences of a shape may have, if they have equally many: kernels choose their blocks by it."""
        fewest = sequences // _GROWTH + 1  # sequences that have this shape
        return min(self.rows_per_sequence, -(-rows // fewest))

    def widths(self) -> list[int]:
        """Of the block tables, but for those of more rows than a sequence may have."""
        found = [self.shape(1, 1, 1).pages]
        while found[-1] < self.pages:
            found.append(self.shape(1, 1, found[-1] + 1).pages)
        return found

    def shapes(self) -> list[BatchShape]:
        """All that can come up, short and small ones first."""
        pairs = {
            (row_bucket(rows), _grown(sequences, 1, self.sequences))
            for sequences in range(1, min(self.sequences, self.rows) + 1)
            for rows in range(sequences, min(sequences * self.rows_per_sequence, self.rows) + 1)
        }
        found = {self.shape(rows, sequences, pages) for rows, sequences in pairs for pages in self.widths()}
        return sorted(found, key=lambda shape: (shape.pages, shape.sequences, shape.rows))


def _grown(count: int, smallest: int, largest: int) -> int:
    size = smallest
    while size < count:
        size *= _GROWTH
    return max(count, min(size, largest))
