"""How prompts share the tokens of a forward that decoding leaves to them."""

from __future__ import annotations

from collections.abc import Mapping


def share(budget: int, needs: Mapping[int, int]) -> dict[int, int]:
    """Tokens for each request of ``needs``: what it still has to compute, by request id, the oldest request first.

    Half is the oldest's, so that it comes to its end whatever follows; the rest goes to the shortest first, so that a
    short prompt does not wait until a long one is computed. Nobody gets more than it needs.
    """
    if not needs:
        return {}
    oldest = next(iter(needs))
    shares = dict.fromkeys(needs, 0)
    shares[oldest] = min(needs[oldest], -(-budget // 2))
    left = budget - shares[oldest]
    for request_id in sorted(needs, key=lambda one: needs[one] - shares[one]):
        more = min(needs[request_id] - shares[request_id], left)
        shares[request_id] += more
        left -= more
    return shares
