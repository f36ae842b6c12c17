"""Workers: each owns a model with its KV tensors, and runs its forwards."""

from pearl.workers.graph_runner import GraphRunner, why_not_captured
from pearl.workers.model_runner import ModelRunner, TargetRunner
from pearl.workers.queue import DeviceQueue, HostQueue, open_queue
from pearl.workers.worker import InlineWorker, Reply, ThreadWorker, Worker

__all__ = [
    "DeviceQueue",
    "GraphRunner",
    "HostQueue",
    "InlineWorker",
    "ModelRunner",
    "Reply",
    "TargetRunner",
    "ThreadWorker",
    "Worker",
    "open_queue",
    "why_not_captured",
]
