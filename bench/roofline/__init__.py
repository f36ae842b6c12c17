"""How near to the memory's speed the CPU kernels come, and what it gives beside other engines."""
