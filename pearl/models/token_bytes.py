"""What bytes a token stands for, where a tokenizer's decoder puts characters together from bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # written as themselves by byte-level BPE
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")


class TokenBytes(dict[int, "bytes | None"]):
    """Of a tokenizer in Rust; fills itself as it is asked. ``[token]`` is b"" for a token without text; where only some
    tokens are bytes, it is None for the others, whose text is whole characters.

    ``replaces_each``: bytes that are no character decode to a U+FFFD each; otherwise a stretch of them that could have
    begun a character decodes to one.
    """

    def __init__(self, backend: Any, special: Collection[int], byte_level: bool) -> None:
        super().__init__()
        self._backend, self._special, self._byte_level = backend, frozenset(special), byte_level
        self.replaces_each = not byte_level

    @classmethod
    def of(cls, backend: Any, special: Collection[int]) -> TokenBytes | None:
        """``special``: ids that decoding leaves out. None if the decoder joins texts, or does something unknown."""
        kinds = _decoder_kinds(backend)
        byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        return cls(backend, special, byte_level) if byte_level or "ByteFallback" in kinds else None

    def __missing__(self, token: int) -> bytes | None:
        data = self[token] = self._read(token)
        return data

    def _read(self, token: int) -> bytes | None:
        text = None if token in self._special else self._backend.id_to_token(token)
        if text is None:
            return b""
        if not self._byte_level:
            return bytes([int(text[3:5], 16)]) if _FALLBACK.fullmatch(text) else None
        try:
            return bytes(map(_BYTE_LEVEL.__getitem__, text))
        except KeyError:  # an added token, written as it is
            return str(text).encode()


def _decoder_kinds(backend: Any) -> set[str]:
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder])}
