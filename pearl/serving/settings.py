"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """``names``: of the model, all of which requests may use; answers name the first.

    ``api_key``: None lets everyone in. ``origins``: web pages that may ask, for CORS; none by default.
    ``replica``: which one this is, the label ``engine`` of its metrics.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = 16 * MEBIBYTE
    replica: str = "0"

    @property
    def name(self) -> str:
        return self.names[0]
