"""The values of options that are words: also what the command line offers, which must not import torch to do so."""

from typing import Literal

MethodName = Literal["pearl", "speculative", "autoregressive"]
Verification = Literal["rejection", "coupled"]
WindowRule = Literal["balanced", "fastest"]
