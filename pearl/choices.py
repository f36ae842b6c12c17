"""The values of options that are words: also what the command line offers, which must not import torch to do so."""

from typing import Literal

MethodName = Literal["pearl", "speculative", "autoregressive"]
Verification = Literal["rejection", "coupled"]
PaceName = Literal["auto", "balanced"]
ShapeName = Literal["tiny-target", "tiny-draft", "1b", "8b", "32b", "70b"]  # of pearl.bench.shapes.SHAPES
