"""What the endpoints work with; one for each app."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pearl.serving.async_engine import AsyncEngine
from pearl.serving.chat_markup import ChatMarkup
from pearl.serving.errors import ApiError
from pearl.serving.metrics import Metrics
from pearl.serving.protocol import Body
from pearl.serving.sampling import SamplingDefaults
from pearl.serving.settings import ServerSettings
from pearl.serving.texts import Texts


@dataclass(frozen=True)
class Service:
    engine: AsyncEngine
    settings: ServerSettings
    defaults: SamplingDefaults
    texts: Texts
    metrics: Metrics
    markup: ChatMarkup
    created: int = field(default_factory=lambda: int(time.time()))

    def admit(self, body: Body) -> None:
        """Refuse, before anything is done, a request for another model or with fields that mean nothing here.

        Raises ApiError or InvalidRequestError.
        """
        if body.model is not None:
            self.require_model(body.model)
        body.refuse_unknown()

    def require_model(self, name: str) -> None:
        if name not in self.settings.names:
            sentence = f"the model {name[:200]!r} is not served here; this is {', '.join(self.settings.names)}"
            raise ApiError(404, sentence, param="model", code="model_not_found")
