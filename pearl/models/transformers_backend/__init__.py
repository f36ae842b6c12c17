"""Any causal LM of transformers whose attention goes through its attention interface, run on our pages."""

from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.describe import describe
from pearl.models.transformers_backend.loader import check_files, load
from pearl.models.transformers_backend.model import TransformersModel

__all__ = ["TransformersConfig", "TransformersModel", "check_files", "describe", "load"]
