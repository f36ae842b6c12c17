"""Models: one decoder for all supported families, its weights, its KV tensors, its tokenizer."""

from pearl.models.bundled import bundled_path
from pearl.models.decoder import Decoder
from pearl.models.forward_batch import ForwardBatch
from pearl.models.fused_decoder import FusedDecoder, can_fuse
from pearl.models.fused_window import FusedWindow, WindowRing, can_fuse_windows
from pearl.models.kv_cache import KVCache
from pearl.models.loader import load_model
from pearl.models.model_config import ModelConfig
from pearl.models.tokenizer import IncrementalDetokenizer, Tokenizer

__all__ = [
    "Decoder",
    "ForwardBatch",
    "FusedDecoder",
    "FusedWindow",
    "IncrementalDetokenizer",
    "KVCache",
    "ModelConfig",
    "Tokenizer",
    "WindowRing",
    "bundled_path",
    "can_fuse",
    "can_fuse_windows",
    "load_model",
]
