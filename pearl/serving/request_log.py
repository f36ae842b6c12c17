"""One line in the log for each request that generated; nothing of its text."""

from __future__ import annotations

import logging
import time
from collections import Counter

from pearl.serving.request_record import RequestRecord
from pearl.serving.usage import totals

_LOG = logging.getLogger("pearl.serving")


def log_request(record: RequestRecord) -> None:
    seconds = time.monotonic() - record.arrival
    total = totals(record.outputs)
    reasons = Counter(record.reasons.values())
    parts = [
        f"{record.id} {record.outcome}",
        f"prompt={record.prompt_tokens} output={record.generated}",
        "ended=" + (",".join(f"{reason}:{count}" for reason, count in sorted(reasons.items())) or "none"),
        f"first={record.first_token:.3f}s" if record.first_token is not None else "first=none",
        f"total={seconds:.3f}s",
    ]
    if total.tested:
        parts.append(f"accepted={total.accepted}/{total.tested}")
    if record.error is not None:
        parts.append(f"error={record.error.splitlines()[0]!r}")
    _LOG.log(logging.INFO if record.error is None else logging.ERROR, "%s", " ".join(parts))
