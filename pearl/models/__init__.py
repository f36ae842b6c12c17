"""Models: one decoder for all supported families, its weights, its KV tensors, its tokenizer."""

from pearl.models.bundled import bundled_path
from pearl.models.causal_model import CausalModel
from pearl.models.decoder import Decoder
from pearl.models.detokenizer import IncrementalDetokenizer
from pearl.models.forward_batch import ForwardBatch
from pearl.models.fused_decoder import FusedDecoder, can_fuse
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.loader import load_model
from pearl.models.model_config import ModelConfig
from pearl.models.model_shape import ModelShape
from pearl.models.tokenizer import Tokenizer

__all__ = [
    "CausalModel",
    "Decoder",
    "ForwardBatch",
    "FusedDecoder",
    "HiddenStates",
    "IncrementalDetokenizer",
    "KVCache",
    "ModelConfig",
    "ModelShape",
    "Tokenizer",
    "bundled_path",
    "can_fuse",
    "load_model",
]
