"""Which of the two backends runs a model: the native decoder, or transformers' own module on our pages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

import torch

from pearl.choices import BackendName
from pearl.errors import UnsupportedModelError
from pearl.models import transformers_backend
from pearl.models.checkpoint import stored_config
from pearl.models.model_config import ModelConfig
from pearl.models.transformers_backend import TransformersConfig

DescribedModel: TypeAlias = ModelConfig | TransformersConfig
_LOG = logging.getLogger(__name__)


def describe_model(path: str, backend: BackendName, dtype: torch.dtype | None = None) -> DescribedModel:
    """The shape of a model in a local folder or under a hub id, and with it the backend that runs it.

    "auto": the native decoder where it implements the model, else transformers; that is logged, with the reason.
    dtype: to compute in; None: what the checkpoint says. Raises ModelLoadError or UnsupportedModelError.
    """
    if backend == "transformers":
        return transformers_backend.describe(path, dtype)
    try:
        return ModelConfig.from_pretrained(path, dtype)
    except UnsupportedModelError as native:
        if backend == "native":
            raise
        try:
            config = transformers_backend.describe(path, dtype)
        except UnsupportedModelError as error:
            if str(error) == str(native):  # of what neither reads, as most quantisations
                raise
            raise UnsupportedModelError(f"{native}; and with transformers' own module: {error}") from error
        _LOG.warning("%s runs through transformers' %s, which is slower: %s", path, config.architecture, native)
        return config


def check_weights(folder: Path, config: DescribedModel) -> DescribedModel:
    """The shape as the folder's files fulfil it, by their headers. Raises ModelLoadError or UnsupportedModelError."""
    if isinstance(config, ModelConfig):
        return stored_config(folder, config)
    transformers_backend.check_files(folder)
    return config
