"""What options may be, as far as the command line offers or checks it, which must not import torch to do so."""

from typing import Literal

MethodName = Literal["pearl", "speculative", "autoregressive"]
Verification = Literal["rejection", "coupled", "block"]
BackendName = Literal["auto", "native", "transformers"]
PaceName = Literal["auto", "balanced"]
LONGEST_WINDOW = 256
ShapeName = Literal["tiny-target", "tiny-draft", "1b", "8b", "32b", "70b"]  # of pearl.bench.shapes.SHAPES
