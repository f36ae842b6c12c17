"""The compiled module (csrc/python/cuda_bindings.cpp). Addresses are integers, 0 for none.

``where``: number of the device, handle of the stream. A kernel that cannot take its arguments raises ValueError, any
other CUDA error RuntimeError.
"""

class Logits:
    def __init__(self, address: int, dtype: int, rows: int, stride: int, /) -> None: ...

class Sampling:
    def __init__(self, temperature: int, top_k: int, top_p: int, min_p: int, seed: int, /) -> None: ...

def driver_version() -> int: ...  # 1000 * major + 10 * minor; 0 without a driver
def runtime_version() -> int: ...  # of the toolkit that the module was built with
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
    where: tuple[int, int],
    /,
) -> None: ...
def silu_and_mul(
    dtype: int, rows: int, width: int, x: int, x_stride: int, out: int, where: tuple[int, int], /
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
    where: tuple[int, int],
    /,
) -> None: ...
def copy_blocks(cache: int, pages: int, page_bytes: int, pairs: int, count: int, where: tuple[int, int], /) -> None: ...
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
    workspace: int,
    workspace_bytes: int,
    where: tuple[int, int],
    /,
) -> None: ...
def verify_attention_workspace(
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
    where: tuple[int, int],
    /,
) -> int: ...
def verify(
    logits: Logits,
    sampling: Sampling,
    draft_tokens: int,
    row_start: int,
    positions: int,
    requests: int,
    vocab_size: int,
    coupled: bool,
    draft_logprobs: int,
    draft_logits: Logits,
    draft_rows: int,
    draft_temperature: int,
    accepted: int,
    next_token: int,
    workspace: int,
    workspace_bytes: int,
    where: tuple[int, int],
    /,
) -> None: ...
def verify_workspace(
    logits: Logits,
    sampling: Sampling,
    draft_tokens: int,
    row_start: int,
    positions: int,
    requests: int,
    vocab_size: int,
    coupled: bool,
    draft_logprobs: int,
    draft_logits: Logits,
    draft_rows: int,
    draft_temperature: int,
    accepted: int,
    next_token: int,
    where: tuple[int, int],
    /,
) -> int: ...
