"""What a kernel takes of a multiprocessor: ptxas' verbose log and PTX read, and the occupancy that follows.

Limits are those of the table "Technical specifications per compute capability" of the CUDA C++ programming guide.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

WARP = 32
_MAX_WARPS, _MAX_BLOCKS = 64, 32  # of a multiprocessor, for all architectures here
_REGISTERS = 65536  # of a multiprocessor
_REGISTER_UNIT, _WARP_UNIT = 256, 4  # registers are given out by 256 to a warp, by four warps at a time
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024  # bytes of a block: granularity, and what the system takes

ARCHITECTURES = tuple(_SHARED)  # 80: A100, 90: H100 and H200, 100: B200


@dataclass(frozen=True)
class Usage:
    """Registers of a thread; bytes of stack of a thread, of spill loads and stores in the code, of shared memory."""

    registers: int
    stack: int = 0
    spilled: int = 0
    static_shared: int = 0
    dynamic_shared: int | None = 0  # None: chosen at launch
    threads: int | None = None  # of a block, at most; None: chosen at launch

    @property
    def exact(self) -> bool:
        """Whether everything that occupancy depends on is known before the launch."""
        return self.dynamic_shared is not None and self.threads is not None

    def warps(self, arch: int) -> int:
        """Warps that one multiprocessor holds at a time; an upper bound unless ``exact``."""
        by_registers = _REGISTERS // _round_up(self.registers * WARP, _REGISTER_UNIT) if self.registers else _MAX_WARPS
        by_registers = min(by_registers // _WARP_UNIT * _WARP_UNIT, _MAX_WARPS)
        block = math.ceil((self.threads or WARP) / WARP)
        shared = _round_up(self.static_shared + (self.dynamic_shared or 0), _SHARED_UNIT) + _SHARED_RESERVED
        if self.threads is None:
            return by_registers if shared <= _SHARED[arch] else 0
        return min(by_registers // block, _SHARED[arch] // shared, _MAX_BLOCKS) * block


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: what it takes, or why it could not be compiled."""

    name: str
    arch: int
    seconds: float  # of the compiler's run, which may have made other kernels too
    usage: Usage | None = None  # or an error
    error: str | None = None
    spills: str | None = None  # why it may spill registers

    @property
    def problem(self) -> str | None:
        """The sentence that fails the report, if there is one."""
        if self.usage is None:
            return self.error
        if self.usage.warps(self.arch) == 0:
            return f"no block fits a multiprocessor of sm_{self.arch}"
        if self.spilling and not self.spills:
            return (
                f"{self.usage.stack} bytes of stack, {self.usage.spilled} of spills, and nothing says why they may be"
            )
        return None

    @property
    def spilling(self) -> bool:
        """Stack is spilled registers, or arrays indexed at run time; both are traffic to memory."""
        return self.usage is not None and (self.usage.stack > 0 or self.usage.spilled > 0)


_ENTRY_LOG = re.compile(r"Compiling entry function '(\S+)' for")
_STACK_LOG = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED_LOG = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def read_log(log: str) -> dict[str, Usage]:
    """The kernels of a log of ``ptxas -v``, by their (mangled) names."""
    kernels: dict[str, Usage] = {}
    name: str | None = None
    stack = spilled = 0
    for line in log.splitlines():
        if entry := _ENTRY_LOG.search(line):
            name, stack, spilled = entry[1], 0, 0
        elif frame := _STACK_LOG.search(line):  # of the kernel, or of a function that it calls
            stack, spilled = max(stack, int(frame[1])), spilled + int(frame[2]) + int(frame[3])
        elif name is not None and (used := _USED_LOG.search(line)):
            kernels[name] = Usage(int(used[1]), stack, spilled, int(used[2] or 0))
            name = None
    return kernels


_ENTRY_PTX = re.compile(r"\.entry\s+(\w+)\s*\(.*?\)(.*?)\{", re.DOTALL)
_THREADS_PTX = re.compile(r"\.(?:max|req)ntid\s+([\d, ]+)")
_EXTERN_PTX = re.compile(r"\.extern\s+\.shared[^;]*?(\w+)\[\]")


def add_launch(kernels: dict[str, Usage], ptx: str) -> dict[str, Usage]:
    """``kernels`` with what their PTX says of the launch: the bound on threads, and whether it sizes shared memory."""
    result = dict(kernels)
    sized_at_launch = _EXTERN_PTX.findall(ptx)
    entries = list(_ENTRY_PTX.finditer(ptx))
    ends = [entry.start() for entry in entries[1:]] + [len(ptx)]
    for entry, end in zip(entries, ends, strict=False):
        if entry[1] not in kernels:
            continue
        body = ptx[entry.end() : end]
        bound = _THREADS_PTX.search(entry[2])
        result[entry[1]] = dataclasses.replace(
            kernels[entry[1]],
            threads=math.prod(int(size) for size in bound[1].split(",")) if bound else None,
            dynamic_shared=None if any(name in body for name in sized_at_launch) else 0,
        )
    return result


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
