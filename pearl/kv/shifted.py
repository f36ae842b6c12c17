"""The text as a drafter's KV has it that lags one position behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class Shifted(Sequence[int]):
    """What position p of such a KV depends on, beside all before it: the token at p + 1; at 0 the first two tokens.

    So equal prefixes of it are of equal texts, as the prefix cache wants. A view: costs nothing to make.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, int):
            return self[index : index + 1][0]
        begin, end, _ = index.indices(len(self))
        part = list(self._tokens[begin + 1 : end + 1])
        if begin == 0 and part:
            part[0] += self._tokens[0] << 32  # ids are below 2**31
        return part
