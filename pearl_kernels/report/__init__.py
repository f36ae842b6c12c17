"""``python -m pearl_kernels.report``: which provider runs each operator, and what the GPU kernels take.

Needs no GPU: Triton's and CUDA's kernels are compiled ahead of time for every architecture that the project builds
for, and the assembler's words become a table of registers, shared memory, spills and occupancy.
"""
