"""Workers: each owns a model with its KV tensors, and runs its forwards."""

from pearl.workers.model_runner import ModelRunner, TargetRunner
from pearl.workers.worker import InlineWorker, ThreadWorker, Worker

__all__ = ["InlineWorker", "ModelRunner", "TargetRunner", "ThreadWorker", "Worker"]
