"""Which operators, which queue and which runner a model gets, for a configuration."""

from __future__ import annotations

from pearl.config import EngineConfig, Role
from pearl.errors import ConfigurationError
from pearl.heads import Head
from pearl.heads.runner import HeadRunner
from pearl.models import CausalModel, Decoder, KVCache, ModelShape
from pearl.parallel import ParallelRunner, RankSpec, start_parallel
from pearl.workers import DeviceQueue, GraphRunner, ModelRunner, open_queue, why_not_captured
from pearl_kernels import KernelSet, Situation, select

_MOST_GRAPH_ROWS = 512  # beyond that many, computing should take longer than launching from Python; not measured yet


def kernels_for(config: EngineConfig, role: Role, model: ModelShape) -> KernelSet:
    """The operators of one model's worker."""
    draft_threads, target_threads = config.resolve_threads()
    threads, weights = (
        (draft_threads, config.draft_weights) if role == "draft" else (target_threads, config.target_weights)
    )
    dtype = config.torch_dtype or model.dtype
    device = config.resolve_device(role)
    rule = config.verification
    situation = Situation(device.type, dtype, model.head_dim, threads, config.page_size, weights, rule, model.sinks)
    return select(situation)


def make_runner(
    config: EngineConfig, role: Role, model: CausalModel, cache: KVCache, hidden_layers: tuple[int, ...] = ()
) -> ModelRunner:
    """Around a model and its cache, with the queue of its device. ``hidden_layers``: whose states a drafter reads."""
    queue, (beside, threads) = _queue(config, role), config.resolve_threads()
    if role == "draft":
        threads = config.draft_threads_alone
    # What transformers' own code does between its kernels may need the host.
    most_rows = _most_graph_rows(config, role, model.kernels, queue) if isinstance(model, Decoder) else 0
    if isinstance(model, Decoder) and most_rows:
        return GraphRunner(
            model,
            cache,
            config.page_size,
            queue,
            most_rows,
            config.max_num_seqs,
            _rows_per_sequence(config, role),
            hidden_layers,
        )
    return ModelRunner(
        model, cache, config.page_size, queue, threads, hidden_layers, beside if role == "draft" else None
    )


def make_head_runner(config: EngineConfig, head: Head, cache: KVCache) -> HeadRunner:
    queue, beside = _queue(config, "draft"), config.resolve_threads()[0]
    return HeadRunner(head, cache, config.page_size, queue, config.draft_threads_alone, beside)


def make_parallel_runner(
    config: EngineConfig,
    path: str,
    model: ModelShape,
    max_model_len: int,
    num_pages: int,
    hidden_layers: tuple[int, ...] = (),
) -> ParallelRunner:
    """Of a target whose ranks load their own weights and make their own caches."""
    devices, queue = config.resolve_target_devices(), _queue(config, "target")
    spec = RankSpec(
        rank=0,
        ranks=len(devices),
        store_port=0,
        path=path,
        device=str(devices[0]),
        dtype=config.torch_dtype or model.dtype,
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=config.page_size,
        threads=max(1, config.resolve_threads()[1] // len(devices)),
        most_rows=_most_graph_rows(config, "target", kernels_for(config, "target", model), queue),
    )
    names = [str(device) for device in devices]
    return start_parallel(spec, names, queue, config.max_num_seqs, _rows_per_sequence(config, "target"), hidden_layers)


def _most_graph_rows(config: EngineConfig, role: Role, kernels: KernelSet, queue: DeviceQueue) -> int:
    """Rows that a captured forward may have; 0: nothing is captured."""
    if config.enforce_eager or not queue.asynchronous:
        return 0
    if reason := why_not_captured(kernels):
        raise ConfigurationError(f"no CUDA graphs of the {role}: {reason}; use enforce_eager=True")
    return min(config.max_num_seqs * _rows_per_sequence(config, role), _MOST_GRAPH_ROWS)


def _rows_per_sequence(config: EngineConfig, role: Role) -> int:
    """Of captured forwards: the target's have one for each pending token and one more. Windows are not among them."""
    return config.most_judged if role == "target" else 1


def _queue(config: EngineConfig, role: Role) -> DeviceQueue:
    """Where both share a GPU the draft's kernels go first, on multiprocessors that the target may leave to it."""
    shares, device = config.shares_gpu, config.resolve_device(role)
    if role == "draft":
        return open_queue(role, device, urgent=shares)
    return open_queue(role, device, spare=config.draft_sms if shares else None)
