"""Settings of the engine's tests, and an engine around fakes (engine_rig.py).

Other engines are around simulated models (engine_sim.py) and toys with logits (engine_toy.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_rig import Rig

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a GPU machine without it runs the tests that need none
    pass
else:
    # Deterministic: a failure here is a failure everywhere. Raise max_examples by hand when the scheduler changes.
    settings.register_profile(
        "engine", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("engine")


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(overlaps=request.param)
    yield made
    made.engine.close()
