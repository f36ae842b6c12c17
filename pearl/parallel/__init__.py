"""Tensor parallelism: one model on several devices, a process for each rank but the first."""

from pearl.parallel.messages import RankSpec
from pearl.parallel.parallel_runner import ParallelRunner, start_parallel

__all__ = ["ParallelRunner", "RankSpec", "start_parallel"]
