"""The engine's configuration: checked as a whole before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from pearl.choices import LONGEST_WINDOW, BackendName, MethodName, PaceName, Verification
from pearl.devices import check_device, cpu_cores
from pearl.errors import ConfigurationError
from pearl.user_values import as_flag, as_integer, shown, unknown_names
from pearl_kernels import WeightFormat

Role = Literal["draft", "target"]
NGRAM = "ngram"  # as ``draft``: propose from the request's own text instead of a model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_PENDING = 1 << 16  # drafted tokens of all requests together: each keeps a row of logits
_MOST_PREPARED, _AUTO_PREPARED = 256, 16
_PROMPT_ROWS = 64  # of logits, where verdicts have fewer: enough for a forward to be worth its weights
_CPU_PREFILL_CHUNK = 128  # computed in the time of a few decoding rounds; smaller ones make prompts dearer
# The largest of each count: beyond it the engine would allocate without end for nothing.
_COUNTS = {
    "max_window": LONGEST_WINDOW,
    "max_num_seqs": 4096,
    "max_num_batched_tokens": 1 << 20,
    "page_size": 1024,
    "max_waiting": 1 << 31,
    "target_parallel": 1024,
}
_OPTIONAL_COUNTS = {
    "prefill_chunk": 1 << 20,
    "max_model_len": 1 << 31,  # the models' own limit is checked when they are known
    "kv_cache_memory": 1 << 50,
    "draft_threads": 1024,
    "target_threads": 1024,
    "draft_sms": 1024,
}


@dataclass(frozen=True)
class EngineConfig:
    """Keyword arguments of ``pearl.LLM``.

    Integers of numpy, whole floats, paths, ``torch.dtype`` and ``torch.device`` become what the fields hold; a number
    is no bool and a bool no number. ConfigurationError names what cannot be used.

    target, draft: local folder, hub id or GGUF file (of the hub: "repository:file.gguf"); None = the bundled pair.
        draft="ngram" drafts by prompt lookup; an EAGLE-3 head or Medusa heads of the target are told by their
        config.json (docs/models.md).
    method: "pearl" | "speculative" | "autoregressive". verification: "rejection" | "coupled" | "block",
        which is rejection for all tokens of a round together: more of them are accepted. Requests with a seed still
        have them tested one by one, so that a seed gives its output again.
    pace: how "pearl" and "speculative" go about it where the window is not fixed: "auto", what is predicted to be the
        fastest from measured speeds and acceptance: of "pearl" any mode (``pearl.methods``; under load plain decoding
        too) with windows of its own for each request, of "speculative" its windows. "balanced": PEARL's rule in the
        paper, the smallest window that takes as long to draft as to verify.
    window: drafted tokens a round, always in the method's own mode; or "auto", up to max_window.
    prepared_windows: windows that the draft prepares in a round, of all requests together, each for one verdict that
        might come (docs/algorithm.md); "auto": as the pace says. No output depends on it.
    pre_verify, post_verify: PEARL's two halves; switching one off is an ablation, the output stays exact.
    device: "auto" | "cpu" | "cuda[:i]"; draft_device, target_device override it for one model.
    target_parallel: ranks that share the target's weights (tensor parallel), each a process; on GPUs one rank each,
        from the target's device on. The draft may share a device with a rank.
    enforce_eager: on CUDA, launch every kernel from Python instead of replaying CUDA graphs; the same results.
    capture_seconds: how long building an LLM on CUDA may take to capture graphs of the shapes that will come up; those
        that are left, and with 0 all, are captured in the round that needs them. Logged by ``pearl.engine.warm_up``.
    draft_sms: where both models share one GPU, how many multiprocessors, at least, the target leaves to the draft (a
        green context). None: two streams share them all. Either way the draft's kernels go first.
    backend: what computes a model: "native", our decoder; "transformers", transformers' own module with its attention
        on our pages: many more families, slower; "auto", the native one where it implements the model, else
        transformers (logged by ``pearl.models.backend``). draft_backend: the draft's, where it differs.
    dtype: "auto" (the checkpoint's) | "float32" | "bfloat16" | "float16", or torch's.
    target_weights, draft_weights: "full" (in dtype) | "int8", on CPU: each output channel of a matrix becomes 8-bit
        integers with a scale, half the bytes of bf16. An int8 target is another model, whose own output is exact; an
        int8 draft leaves the target's output as it is. A checkpoint that is quantised already is refused.
    max_num_seqs: requests that run at once. max_model_len: positions a sequence may use, at most (and if None) as many
        as both models were made for.
    max_num_batched_tokens: most tokens of one target forward; longer prompts are computed in chunks.
    prefill_chunk: most tokens of prompts in a forward beside requests that decode, which wait for it; None = 128 on
        CPU, where a token costs what it costs alone, and on GPUs what max_num_batched_tokens leaves.
    kv_cache_memory: bytes for both models' KV; None = on CPU room for max_num_seqs full sequences, at most 1 GiB; on
        GPUs what is free after a profiling run.
    max_waiting: requests that may wait beside those that run; more are refused. seed: of requests without one; None =
        fresh ones.
    draft_threads, target_threads: CPU threads of each model's forwards; None: all cores for the target, and for the
        draft a quarter while it works beside the target, all while it works alone.
    """

    target: str | None = None
    draft: str | None = None
    method: MethodName = "pearl"
    verification: Verification = "rejection"
    pace: PaceName = "auto"
    window: int | Literal["auto"] = "auto"
    max_window: int = 16
    prepared_windows: int | Literal["auto"] = "auto"
    pre_verify: bool = True
    post_verify: bool = True
    device: str = "auto"
    draft_device: str | None = None
    target_device: str | None = None
    target_parallel: int = 1
    enforce_eager: bool = False
    draft_sms: int | None = None
    capture_seconds: int = 10
    backend: BackendName = "auto"
    draft_backend: BackendName | None = None
    dtype: str = "auto"
    target_weights: WeightFormat = "full"
    draft_weights: WeightFormat = "full"
    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    prefill_chunk: int | None = None
    kv_cache_memory: int | None = None
    page_size: int = 16
    prefix_caching: bool = True
    max_waiting: int = 100_000
    seed: int | None = None
    draft_threads: int | None = None
    target_threads: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From names that a user wrote; ConfigurationError about unknown ones tells the known ones."""
        if sentence := unknown_names("options", options, [field.name for field in fields(cls)]):
            raise ConfigurationError(sentence)
        return cls(**options)

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_counts()
        for name in ("pre_verify", "post_verify", "enforce_eager", "prefix_caching"):
            flag = as_flag(getattr(self, name))
            if flag is None:
                raise ConfigurationError(f"{name} must be True or False, not {shown(getattr(self, name))}")
            self._set(name, flag)
        if self.method == "speculative" and not (self.pre_verify and self.post_verify):
            raise ConfigurationError("pre_verify and post_verify are PEARL's; method='speculative' has neither")
        if self.pace == "balanced" and (self.method != "pearl" or self.window != "auto"):
            raise ConfigurationError("pace='balanced' is the rule of method='pearl' for window='auto'")
        for device in (self.device, self.draft_device, self.target_device):
            check_device(device)
        self.resolve_target_devices()
        self._check_weights()
        if self.draft_sms is not None and not self.shares_gpu:
            raise ConfigurationError("draft_sms is for a GPU that both models share; give them the same CUDA device")

    def _check_weights(self) -> None:
        both: dict[Role, WeightFormat]
        both = {"target": self.target_weights, "draft": self.draft_weights}
        for role, weights in both.items():
            self._one_of(f"{role}_weights", get_args(WeightFormat))
            if weights != "full" and self.resolve_device(role).type != "cpu":
                raise ConfigurationError(f"{role}_weights={weights!r} runs on cpu only; use {role}_device='cpu'")
        if self.target_weights != "full" and self.target_parallel > 1:
            raise ConfigurationError(f"target_weights={self.target_weights!r} and target_parallel exclude each other")

    def _check_texts(self) -> None:
        for name in ("target", "draft"):
            self._set(name, _model_name(name, getattr(self, name)))
        if isinstance(self.dtype, torch.dtype):
            self._set("dtype", str(self.dtype).removeprefix("torch."))
        self._one_of("method", get_args(MethodName))
        self._one_of("verification", get_args(Verification))
        self._one_of("pace", get_args(PaceName))
        self._one_of("backend", get_args(BackendName))
        if self.draft_backend is not None:
            self._one_of("draft_backend", get_args(BackendName))
        self._one_of("dtype", ("auto", *_DTYPES))
        for name in ("device", "draft_device", "target_device"):
            device = getattr(self, name)
            if isinstance(device, torch.device):
                self._set(name, str(device))
            elif not isinstance(device, str) and (device is not None or name == "device"):
                raise ConfigurationError(f"{name} must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {shown(device)}")

    def _check_counts(self) -> None:
        for name, highest in (_COUNTS | _OPTIONAL_COUNTS).items():
            if getattr(self, name) is not None or name in _COUNTS:
                self._set(name, self._count(name, highest))
        self._set("capture_seconds", self._count("capture_seconds", 3600, least=0))
        if not (isinstance(self.window, str) and self.window == "auto"):
            self._set("window", self._count("window", _COUNTS["max_window"], '"auto" or '))
        if not (isinstance(self.prepared_windows, str) and self.prepared_windows == "auto"):
            self._set("prepared_windows", self._count("prepared_windows", _MOST_PREPARED, '"auto" or ', least=0))
        if self.max_num_seqs * self.largest_window > _MOST_PENDING:
            raise ConfigurationError(
                f"max_num_seqs={self.max_num_seqs} times a window of {self.largest_window} is more than the "
                f"{_MOST_PENDING} drafted tokens whose logits are kept; lower one of them"
            )
        if self.seed is not None:
            seed = as_integer(self.seed)
            if seed is None or not -(2**63) <= seed < 2**64:
                raise ConfigurationError(f"seed must be None or a 64-bit integer, not {shown(self.seed)}")
            self._set("seed", seed)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            raise ConfigurationError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")

    def _count(self, name: str, highest: int, otherwise: str = "", least: int = 1) -> int:
        given = getattr(self, name)
        value = as_integer(given)
        if value is None or not least <= value <= highest:
            raise ConfigurationError(
                f"{name} must be {otherwise}an integer >= {least} and at most {highest}, not {shown(given)}"
            )
        return value

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def uses_draft(self) -> bool:
        return self.method != "autoregressive"

    @property
    def uses_draft_model(self) -> bool:
        return self.uses_draft and self.draft != NGRAM

    @property
    def shares_gpu(self) -> bool:
        """Whether a draft model lives on the GPU of the target, or of its first rank."""
        draft, target = self.resolve_device("draft"), self.resolve_device("target")
        same = draft.index == target.index
        return self.uses_draft_model and draft.type == target.type == "cuda" and same

    @property
    def largest_window(self) -> int:
        return self.max_window if self.window == "auto" else self.window

    @property
    def most_judged(self) -> int:
        """Rows of logits that a verdict on one request has at most: one for each pending token, and one more."""
        return self.largest_window + 1 if self.uses_draft else 1

    @property
    def max_logit_rows(self) -> int:
        """Of one forward of the target: of verdicts, or of prompts whose log-probabilities are wanted."""
        return max(self.max_num_seqs * self.most_judged, _PROMPT_ROWS)

    @property
    def most_prepared(self) -> int:
        """Windows that a round may prepare. Only a draft model does; of its own accord the automatic pace."""
        if not self.uses_draft_model:
            return 0
        if self.prepared_windows != "auto":
            return self.prepared_windows
        chooses = self.window == "auto" and self.pace == "auto" and self.method == "pearl"
        return _AUTO_PREPARED if chooses and self.pre_verify and self.post_verify else 0

    @property
    def prepared_slots(self) -> int:
        """How many prepared windows may be kept: those of a round, and each request's that came true."""
        return self.most_prepared + self.max_num_seqs if self.most_prepared else 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None: the checkpoint's own."""
        return _DTYPES.get(self.dtype)

    def resolve_device(self, role: Role) -> torch.device:
        name = (self.draft_device if role == "draft" else self.target_device) or self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        # Not "cuda" alone: to torch that is whichever GPU the calling thread has chosen.
        return torch.device("cuda:0" if name == "cuda" else name)

    def resolve_backend(self, role: Role) -> BackendName:
        return (self.draft_backend if role == "draft" else None) or self.backend

    def resolve_target_devices(self) -> tuple[torch.device, ...]:
        """One for each rank of the target. ConfigurationError if there are fewer GPUs."""
        first = self.resolve_device("target")
        if self.target_parallel == 1 or first.type == "cpu":
            return (first,) * self.target_parallel
        begin, there = first.index, torch.cuda.device_count()
        if begin + self.target_parallel > there:
            raise ConfigurationError(
                f"target_parallel={self.target_parallel} needs as many GPUs from {first} on; there are {there}"
            )
        return tuple(torch.device("cuda", begin + rank) for rank in range(self.target_parallel))

    def resolve_prefill_chunk(self) -> int:
        if self.prefill_chunk is not None:
            return self.prefill_chunk
        return _CPU_PREFILL_CHUNK if self.resolve_device("target").type == "cpu" else self.max_num_batched_tokens

    def resolve_threads(self) -> tuple[int, int]:
        """(draft, target) intra-op threads.

        The target gets all cores: its helpers sleep while it rests, and where the draft works beside it they use what
        the draft leaves of its cores. The draft gets all where the models always take turns, else a quarter.
        """
        cores = cpu_cores()
        alone = cores if self.method == "speculative" else max(1, cores // 4)
        return self.draft_threads or (alone if self.uses_draft_model else 1), self.target_threads or cores

    @property
    def draft_threads_alone(self) -> int:
        """Of a draft that our kernels compute, in rounds in which the target rests: it has all cores then."""
        return cpu_cores() if self.uses_draft_model and not self.draft_threads else self.resolve_threads()[0]

    @property
    def target_torch_threads(self) -> int:
        """Of a target that torch computes, whose threads spin: those that the draft leaves."""
        if self.target_threads or not self.uses_draft_model or self.method == "speculative":
            return self.resolve_threads()[1]
        return max(1, cpu_cores() - self.resolve_threads()[0])


def _model_name(role: str, given: object) -> str | None:
    """A folder, a file or a hub id as text."""
    if given is None:
        return None
    name = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            f"{role} must be a folder, a hub id or a GGUF file, not {shown(given)}; None is the bundled model"
        )
    return os.path.join(".", name) if name == NGRAM and name is not given else name
