"""llama.cpp by its own C interface: token ids in, token ids out, and no Python but one call for each token.

``llama_cpp.Llama.generate`` decodes the same tokens, with about as much Python around each as a small model's forward
takes, and without flash attention, which llama.cpp itself turns on where it can.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pearl.errors import ConfigurationError

INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python gguf'


def load_library() -> Any:
    """Its C functions. ImportError where the package llama-cpp-python is not installed."""
    return importlib.import_module("llama_cpp.llama_cpp")


class LlamaCpp:
    """One GGUF model with one sequence. Raises what ``load_library`` does, ConfigurationError for what cannot load."""

    def __init__(self, path: Path, positions: int, threads: int) -> None:
        """``positions``: of the longest prompt with its continuation. ``threads``: of prompts and of decoding."""
        self._library = library = load_library()
        self._quiet = library.llama_log_callback(lambda *_: None)  # the library calls it as long as it is loaded
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise ConfigurationError(f"llama.cpp cannot load {path}")
        options = library.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = positions, threads, threads
        options.n_batch = positions  # a prompt is one call; its own n_ubatch stays
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise ConfigurationError(f"llama.cpp has no room for {positions} positions of {path}")
        self._vocab_size = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model)))
        self._one = (library.llama_token * 1)()

    @property
    def build(self) -> str:
        """The instructions and options that it was built with."""
        return str(self._library.llama_print_system_info().decode()).strip(" |")

    def start(self, prompt: Sequence[int]) -> int:
        """Forget the sequence before; the likeliest token after the prompt."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        return self._likeliest((self._library.llama_token * len(prompt))(*prompt), len(prompt))

    def step(self, token: int) -> int:
        """The likeliest after one more token."""
        self._one[0] = token
        return self._likeliest(self._one, 1)

    def _likeliest(self, tokens: Any, count: int) -> int:
        return int(self.logits(tokens, count).argmax())

    def logits(self, tokens: Any, count: int) -> Any:
        """float32 ``[vocabulary]`` after ``count`` more ids in an array of C, valid until the next call."""
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count))
        if code != 0:
            raise ConfigurationError(f"llama.cpp's llama_decode returned {code}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocab_size,))

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
