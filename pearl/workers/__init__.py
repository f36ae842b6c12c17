"""Workers: threads that own a model, its KV tensors and its intra-op threads."""

from pearl.workers.model_runner import ModelRunner, TargetRunner
from pearl.workers.worker import Worker

__all__ = ["ModelRunner", "TargetRunner", "Worker"]
