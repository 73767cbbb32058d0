"""The time as records and labels write it."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime

from pipeline.core.errors import SettingRefused


def now() -> str:
    """Return the time in UTC as RFC 3339 to the second, or SOURCE_DATE_EPOCH when that is set.

    See https://reproducible-builds.org/specs/source-date-epoch/. Raises SettingRefused.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        moment = datetime.now(UTC)
    elif re.fullmatch("[0-9]{1,11}", epoch):
        moment = datetime.fromtimestamp(int(epoch), UTC)
    else:
        raise SettingRefused(
            f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds since 1970",
            "Correct it or unset it.",
        )
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
