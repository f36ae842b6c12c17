"""The compiled module (csrc/python/bindings.cpp). Addresses are integers, 0 for none; ``where`` is the CPU."""

from collections.abc import Sequence

PANEL_COLUMNS: int  # of a packed weight, csrc/include/pearl/params.h

class LinearThreads:
    def __init__(self, threads: int, /) -> None: ...
    def linear(
        self,
        dtype: int,
        format: int,
        rows: int,
        in_features: int,
        out_features: int,
        x: int,
        x_stride: int,
        weight: int,
        scale: int,
        offset: int,
        group: int,
        bias: int,
        out: int,
        /,
    ) -> None: ...

class Logits:
    def __init__(self, address: int, dtype: int, rows: int, stride: int, /) -> None: ...

class Sampling:
    def __init__(self, temperature: int, top_k: int, top_p: int, min_p: int, seed: int, /) -> None: ...

def isa() -> str: ...
def rms_norm(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    out: int,
    eps: float,
    where: None,
    /,
) -> None: ...
def silu_and_mul(dtype: int, rows: int, width: int, x: int, x_stride: int, out: int, where: None, /) -> None: ...
def gelu_and_mul(dtype: int, rows: int, width: int, x: int, x_stride: int, out: int, where: None, /) -> None: ...
def scale_and_cap(
    dtype: int, rows: int, width: int, x: int, x_stride: int, scale: float, softcap: float, where: None, /
) -> None: ...
def rope_and_cache(
    dtype: int,
    tokens: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    q: int,
    q_stride: int,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    positions: int,
    cos_sin: int,
    max_position: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    slot_mapping: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    where: None,
    /,
) -> None: ...
def verify_attention(
    q_dtype: int,
    cache_dtype: int,
    sequences: int,
    tokens: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    pages: int,
    page_size: int,
    q: int,
    q_stride: int,
    k_cache: int,
    v_cache: int,
    block_tables: int,
    table_width: int,
    table_stride: int,
    query_start: int,
    context_lens: int,
    out: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: int,
    most_rows: int,
    counters: int,
    counter_count: int,
    where: None,
    /,
) -> None: ...
def sample(
    logits: Logits,
    sampling: Sampling,
    positions: int,
    vocab_size: int,
    stream: int,
    tokens: int,
    logprobs: int,
    alternatives: int,
    alternative_tokens: int,
    alternative_scores: int,
    drawn_scores: int,
    /,
) -> None: ...
def verify(
    logits: Logits,
    sampling: Sampling,
    draft_tokens: int,
    row_start: int,
    positions: int,
    requests: int,
    vocab_size: int,
    rule: int,
    draft_logprobs: int,
    draft_logits: Logits,
    draft_rows: int,
    draft_temperature: int,
    accepted: int,
    next_token: int,
    where: None,
    /,
) -> None: ...
def copy_blocks(cache: int, pages: int, page_bytes: int, pairs: int, count: int, where: None, /) -> None: ...
def uniform_noise(seed: int, position: int, stream: int, rows: int, vocab_size: int, out: int, /) -> None: ...
def gumbel_noise(seed: int, position: int, stream: int, rows: int, vocab_size: int, out: int, /) -> None: ...
def multiply_registers(dtype: int, steps: int, /) -> int: ...
def stream_read(address: int, bytes: int, streams: int, /) -> int: ...

class Matrix:
    def __init__(
        self,
        format: int,
        in_features: int,
        out_features: int,
        weight: int,
        scale: int,
        offset: int,
        group: int,
        bias: int,
        /,
    ) -> None: ...

class MatrixStack:
    def __init__(
        self,
        count: int,
        first: Matrix,
        weight_stride: int,
        scale_stride: int,
        offset_stride: int,
        bias_stride: int,
        /,
    ) -> None: ...

class ExpertLayer:
    def __init__(
        self, gate_up: MatrixStack, down: MatrixStack, gain: float, limit: float, offset: float, /
    ) -> None: ...

class ExpertThreads:
    def __init__(self, threads: int, /) -> None: ...
    def run(
        self,
        layer: ExpertLayer,
        dtype: int,
        rows: int,
        top_k: int,
        x: int,
        chosen: int,
        weights: int,
        shared: int,
        shared_gate: int,
        out: int,
        /,
    ) -> None: ...

def route(
    dtype: int,
    rows: int,
    experts: int,
    top_k: int,
    logits: int,
    logits_stride: int,
    renormalise: bool,
    chosen: int,
    weights: int,
    /,
) -> None: ...

class Mixture:
    def __init__(
        self, router: Matrix, experts: ExpertLayer, shared_gate: Matrix, top_k: int, renormalise: bool, /
    ) -> None: ...

class Layer:
    def __init__(
        self,
        input_norm: int,
        qkv: Matrix,
        q_norm: int,
        k_norm: int,
        output: Matrix,
        attention_post_norm: int,
        mlp_norm: int,
        gate_up: Matrix,
        down: Matrix,
        mlp_post_norm: int,
        cos_sin: int,
        k_cache: int,
        v_cache: int,
        window: int,
        sinks: int,
        mixture: Mixture | None,
        /,
    ) -> None: ...

class Shape:
    def __init__(
        self,
        dtype: int,
        hidden: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        ffn: int,
        vocab_size: int,
        max_position: int,
        pages: int,
        page_size: int,
        residual_eps: float,
        eps: float,
        scale: float,
        softcap: float,
        norms_projections: bool,
        activation: int,
        embedding_scale: float,
        logits_scale: float,
        logits_softcap: float,
        residual_multiplier: float,
        /,
    ) -> None: ...

class AnyBatch: ...

class Batch(AnyBatch):
    def __init__(
        self,
        tokens: int,
        sequences: int,
        table_width: int,
        num_logits: int,
        input_ids: int,
        positions: int,
        slot_mapping: int,
        block_tables: int,
        query_start: int,
        context_lens: int,
        logits_rows: int,
        /,
    ) -> None: ...

class WorkBatch(AnyBatch):
    def __init__(self, page_size: int, /) -> None: ...
    def set(self, work: Sequence[tuple[object, tuple[int, ...], int, int, tuple[int, ...]]], /) -> None: ...

class Embedding:
    def __init__(self, table: int, packed: Matrix, /) -> None: ...

class Head:
    def __init__(self, norm: int, matrix: Matrix, ids: int, /) -> None: ...

class FeatureInput:
    def __init__(self, token_norm: int, feature_norm: int, norm_before_residual: bool, /) -> None: ...

class States:
    def __init__(
        self, features: int, outputs: int, rows: int, count: int, base: list[int], size: list[int], /
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        shape: Shape,
        layers: list[Layer],
        embedding: Embedding,
        head: Head,
        threads: int,
        beside: int,
        features: FeatureInput | None,
        /,
    ) -> None: ...
    def share_cores(self, shared: bool, /) -> None: ...
    def forward(self, batch: AnyBatch, logits: int, hidden_layers: Sequence[int], hidden: int, /) -> None: ...

class WindowDrafter:
    def __init__(self, decoder: Decoder, /) -> None: ...
    def draft(
        self,
        first: AnyBatch,
        logits: int,
        num_draft: list[int],
        ring_base: list[int],
        ring_size: list[int],
        sampling: Sampling,
        vocab_size: int,
        stream: int,
        ring: int,
        ring_rows: int,
        alternatives: int,
        late: list[tuple[int, int, int, int]],
        late_copies: list[tuple[int, int]],
        states: States | None,
        /,
    ) -> tuple[list[list[int]], list[list[float]], list[list[tuple[float, tuple[int, ...], tuple[float, ...]]]]]: ...

def verify_numbers(
    logits: Logits,
    sampling: Sampling,
    draft_tokens: Sequence[int],
    row_start: Sequence[int],
    positions: Sequence[int],
    vocab_size: int,
    rule: int,
    draft_logprobs: Sequence[float],
    draft_logits: Logits,
    draft_rows: Sequence[int],
    draft_temperature: Sequence[float],
    /,
) -> tuple[list[int], list[int]]: ...
