"""Retries with exponential backoff, for everything that uses the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipeline.core.console import log

if TYPE_CHECKING:
    from stamina.instrumentation import RetryDetails

Result = TypeVar("Result")


def retry(
    action: Callable[[], Result],
    *,
    on: type[Exception],
    attempts: int,
) -> Result:
    """Call ``action``; after an exception of class ``on``, wait and call it again.

    ``attempts`` is the setting network.attempts: the number of calls, the first one included.
    The pauses are about 0.5, 1, 2, 4 and then 5 seconds. Raises the last exception.
    """
    import stamina
    from stamina.instrumentation import set_on_retry_hooks

    set_on_retry_hooks([_log_retry])
    patient = stamina.RetryingCaller(attempts=attempts, timeout=None, wait_initial=0.5)
    return patient(on, action)


def _log_retry(details: RetryDetails) -> None:
    """Print the failure and when the next attempt begins.

    PipelineErrors are printed by their ``what``.
    """
    reason = getattr(details.caused_by, "what", details.caused_by)
    log(f"{reason}; retrying in {details.wait_for:.1f} s")
