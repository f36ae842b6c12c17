"""Which errors end an engine, and not only the requests of a round."""

from __future__ import annotations

import torch

from pearl.errors import CaptureError, RankError

# CUDA's errors after which every call of the process to that device fails, and what it calls them.
_STICKY = {
    214: "uncorrectable ECC error",
    220: "uncorrectable NVLink error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
}


def ends_engine(error: BaseException) -> bool:
    """Whether nothing can be computed after it. Memory that ran out, but not in a capture, can be there the next time.

    What waiting for a device raises is such an error whatever it is: it was not raised by what the wait did.
    """
    if isinstance(error, CaptureError | RankError):
        return True
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    code = getattr(error, "error_code", None) if isinstance(error, torch.AcceleratorError) else None
    # Our own modules, and libraries, tell CUDA's words only.
    return code in _STICKY if code is not None else any(words in str(error) for words in _STICKY.values())
