"""Errors that a user can act on. Each message says what was wrong and what to do."""


class PearlError(Exception):
    """Base class of every error that the library raises on purpose."""


class ConfigurationError(PearlError, ValueError):
    """The engine cannot be built as asked for."""


class UnsupportedModelError(ConfigurationError):
    """The model belongs to a family that the decoder does not implement, or its weights are quantised."""


class ModelLoadError(ConfigurationError):
    """Weights or configuration are missing, or do not fit each other."""


class InvalidRequestError(PearlError, ValueError):
    """One request is refused before it costs anything; other requests are not touched.

    ``param``: the parameter at fault, where it is one.
    """

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(PearlError):
    """The waiting queue is at its limit; try again later."""


class EngineClosedError(PearlError):
    """The engine was closed; build a new one."""


class EngineDrainingError(PearlError):
    """The engine finishes what it has and takes nothing new; try another one."""


class EngineInUseError(PearlError):
    """Another thread is using the engine, or a round is under way; nothing was changed."""


class RoundError(PearlError):
    """The engine failed in a round; the output is incomplete."""


class CaptureError(PearlError):
    """A CUDA graph could not be captured, which leaves torch's allocator unusable. The engine can only be closed."""


class RankError(PearlError):
    """A rank of a tensor-parallel model ended. The engine can only be closed."""
