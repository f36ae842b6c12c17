"""Loads both models, as far as the devices hold them, and divides the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.config import EngineConfig, Role
from pearl.devices import require_supported_gpus
from pearl.engine.kv_budget import decide_pages, require_one_sequence
from pearl.engine.memory import (
    CudaMeter,
    MemoryMeter,
    Share,
    Shares,
    explaining_out_of_memory,
    gib,
    require_room_for_weights,
    shares_of,
)
from pearl.engine.model_pair import Pair, check_pair, check_pair_weights, model_paths
from pearl.engine.runners import kernels_for, make_head_runner, make_parallel_runner, make_runner
from pearl.heads import Head, HeadConfig, load_head
from pearl.heads.runner import HeadRunner
from pearl.models import (
    CausalModel,
    Decoder,
    KVCache,
    Tokenizer,
    load_model,
    transformers_backend,
)
from pearl.models.fused_decoder import EmbeddingRows
from pearl.models.transformers_backend import TransformersConfig
from pearl.models.weight_memory import return_freed
from pearl.models.weight_size import read_bytes
from pearl.parallel import ParallelRunner
from pearl.workers import ModelRunner


@dataclass(frozen=True)
class LoadedModels:
    """Weights and KV tensors. Engines may share them if only one of them works at a time and none caches prefixes."""

    target: ModelRunner
    draft: ModelRunner | None
    tokenizer: Tokenizer
    vocab_size: int  # ids that requests may name and the models draw; padding lies behind
    max_model_len: int
    num_pages: int  # of each model
    target_bytes: int = 0  # of weights that a row reads
    draft_bytes: int = 0  # that drafting a token reads
    head: HeadRunner | None = None  # in the place of a draft model: it reads the target's hidden states

    def close(self) -> None:
        """End the processes that hold parts of the target, if there are any. Idempotent."""
        if isinstance(self.target, ParallelRunner):
            self.target.close()


def load_models(config: EngineConfig, meter: MemoryMeter | None = None) -> LoadedModels:
    """Load both models. Raises ConfigurationError (or a subclass), before any weight is read if it can.

    ``meter`` measures the GPUs' memory; None: with torch.
    """
    target_path, draft_path = model_paths(config)
    require_supported_gpus(config.resolve_target_devices())
    if config.uses_draft_model:
        require_supported_gpus([config.resolve_device("draft")])
    pair = check_pair(config, target_path, draft_path)
    meter = meter or CudaMeter()
    _require_room(config, pair, meter)  # before weights are fetched
    target_path, draft_path, pair = check_pair_weights(target_path, draft_path, pair)
    shares = _require_room(config, pair, meter)
    draft = None
    if draft_path is not None and shares.draft is not None and pair.head is None:
        with explaining_out_of_memory(shares.draft, meter):
            draft = _load(config, "draft", draft_path, shares.draft, pair, target_path)
    if config.target_parallel > 1:
        return _assemble_parallel(config, pair, target_path, draft_path, draft, shares, meter)
    with explaining_out_of_memory(shares.target[0], meter):
        target = _load(config, "target", target_path, shares.target[0], pair)
    head = None
    if draft_path is not None and shares.draft is not None and pair.head is not None:
        with explaining_out_of_memory(shares.draft, meter):
            head = _load_head(config, draft_path, shares.draft, pair, pair.head, target)
    return_freed()
    return assemble(config, pair, target, draft, meter, head)


def assemble(
    config: EngineConfig,
    pair: Pair,
    target: CausalModel,
    draft: CausalModel | None,
    meter: MemoryMeter | None = None,
    head: Head | None = None,
) -> LoadedModels:
    """Give loaded models, or one and a head, each on its role's device, their KV caches and runners.

    Raises ConfigurationError if what the weights leave cannot hold one sequence.
    """
    meter = meter or CudaMeter()
    shares = shares_of(config, pair.target, pair.draft, pair.head)
    num_pages = decide_pages(config, shares, target, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    target_cache = _allocate(config, shares.target[0], num_pages, meter)
    head_runner = None
    hidden_layers: tuple[int, ...] = ()
    if head is not None and shares.draft is not None:
        head_runner = make_head_runner(config, head, _allocate(config, shares.draft, num_pages, meter))
        hidden_layers = head.config.hidden_layers
    target_runner = make_runner(config, "target", target, target_cache, hidden_layers)
    return _loaded(pair, target_runner, draft_runner, num_pages, head_runner)


def _require_room(config: EngineConfig, pair: Pair, meter: MemoryMeter) -> Shares:
    """Refuse what the devices cannot hold, as far as it is known before weights are there."""
    shares = shares_of(config, pair.target, pair.draft, pair.head)
    require_room_for_weights(shares, meter)
    require_one_sequence(config, shares, pair.max_model_len, meter)
    return shares


def _load(
    config: EngineConfig, role: Role, path: str, share: Share, pair: Pair, lender: str | None = None
) -> CausalModel:
    """``lender``: which a draft may take its embeddings from."""
    kernels = kernels_for(config, role, share.config)
    if isinstance(share.config, TransformersConfig):
        return transformers_backend.load(
            path, share.config, device=share.device, kernels=kernels, page_size=config.page_size
        )
    with torch.inference_mode():
        return load_model(
            path,
            device=share.device,
            dtype=share.dtype,
            max_model_len=pair.max_model_len,
            kernels=kernels,
            vocab_size=pair.vocab_size if role == "draft" else 0,
            lender=lender,
        )


def _load_head(
    config: EngineConfig, path: str, share: Share, pair: Pair, head: HeadConfig, target: CausalModel
) -> Head:
    """With the target's embeddings where it has none of its own."""
    there, here = config.resolve_device("target"), share.device

    def embed(ids: Tensor) -> Tensor:
        return target.embed(ids.to(there)).to(here, head.shape.dtype)

    embeddings = None
    if isinstance(target, Decoder) and there == here and target.dtype == head.shape.dtype:
        embeddings = EmbeddingRows.of(target)
    with torch.inference_mode():
        return load_head(
            path,
            head,
            device=here,
            max_model_len=pair.max_model_len,
            kernels=kernels_for(config, "draft", head.shape),
            embed=embed,
            embedding_width=target.embed(torch.zeros(1, dtype=torch.int64, device=there)).shape[1],
            embeddings=embeddings,
        )


def _allocate(config: EngineConfig, share: Share, num_pages: int, meter: MemoryMeter) -> KVCache:
    reason = f"its KV cache needs {gib(num_pages * share.page_bytes)}"
    advice = "lower kv_cache_memory, or leave it out to have it measured"
    with explaining_out_of_memory(share, meter, reason, advice), torch.inference_mode():
        return KVCache.allocate(share.config, num_pages, config.page_size, share.dtype, share.device)


def _draft_runner(
    config: EngineConfig, draft: CausalModel | None, shares: Shares, num_pages: int, meter: MemoryMeter
) -> ModelRunner | None:
    if draft is None or shares.draft is None:
        return None
    return make_runner(config, "draft", draft, _allocate(config, shares.draft, num_pages, meter))


def _assemble_parallel(
    config: EngineConfig,
    pair: Pair,
    path: str,
    draft_path: str | None,
    draft: CausalModel | None,
    shares: Shares,
    meter: MemoryMeter,
) -> LoadedModels:
    """As ``assemble``, with a target whose ranks load their own weights and make their own caches. A head, which reads
    the first rank's states and perhaps its embeddings, is loaded after it.
    """
    num_pages = decide_pages(config, shares, None, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    first = shares.target[0]
    kv = f"its weights need {gib(first.weight_bytes)}, its KV cache {gib(num_pages * first.page_bytes)}"
    hidden_layers = () if pair.head is None else pair.head.hidden_layers
    with explaining_out_of_memory(first, meter, kv):
        target = make_parallel_runner(config, path, pair.target, pair.max_model_len, num_pages, hidden_layers)
    head_runner = None
    if draft_path is not None and shares.draft is not None and pair.head is not None:
        try:
            with explaining_out_of_memory(shares.draft, meter):
                head = _load_head(config, draft_path, shares.draft, pair, pair.head, target.model)
            head_runner = make_head_runner(config, head, _allocate(config, shares.draft, num_pages, meter))
        except BaseException:
            target.close()  # its processes would be left behind
            raise
    return _loaded(pair, target, draft_runner, num_pages, head_runner)


def _loaded(
    pair: Pair, target: ModelRunner, draft: ModelRunner | None, num_pages: int, head: HeadRunner | None = None
) -> LoadedModels:
    target_bytes, draft_bytes = (
        0 if model is None or runner is None else read_bytes(model, model.dtype, device=runner.queue.device.type)
        for model, runner in ((pair.target, target), (pair.draft, draft))
    )
    if pair.head is not None:
        draft_bytes = pair.head.step_elements * pair.head.shape.dtype.itemsize
    return LoadedModels(
        target,
        draft,
        pair.tokenizer,
        pair.vocab_size,
        pair.max_model_len,
        num_pages,
        target_bytes,
        draft_bytes,
        head,
    )
