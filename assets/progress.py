"""Progress of long loops in the event log."""

import time
from collections.abc import Callable

import dagster as dg

PROGRESS_SECONDS = 10.0


def log_progress(context: dg.AssetExecutionContext, action: str) -> Callable[[int, int], None]:
    """Return a callback `(done, total)` that logs "`done` of `total` `action`." at most every ten seconds."""
    logged_at = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= PROGRESS_SECONDS:
            logged_at = time.monotonic()
            context.log.info(f"{done} of {total} {action}.")

    return on_progress
