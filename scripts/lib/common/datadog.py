"""Datadog: where its Agent and its API are, whether the Agent answers, and sending of metrics."""

import socket
import ssl
import time
from collections.abc import Sequence

from pydantic import Field

from lib.common import http
from lib.common.environment import Environment

AGENT_SECONDS = 0.5
SEND_SECONDS = 5.0


class Datadog(Environment):
    """The variables of Datadog's own libraries, and DD_URL: the API, if not that of DD_SITE."""

    api_key: str = Field("", repr=False)
    site: str = "datadoghq.com"
    url: str = ""
    hostname: str = Field(default_factory=socket.gethostname)
    agent_host: str = ""
    trace_agent_url: str = Field("", repr=False)  # may hold credentials
    trace_agent_port: int = Field(8126, ge=1, le=65535)
    trace_enabled: bool = True

    @property
    def api_url(self) -> str:
        """Return the base URL of the API."""
        return self.url.rstrip("/") or f"https://api.{self.site}"

    @property
    def agent_url(self) -> str:
        """Return the URL of the Agent's trace API; an empty string if none is configured."""
        if self.agent_host and not self.trace_agent_url:
            return f"http://{self.agent_host}:{self.trace_agent_port}"
        return self.trace_agent_url

    def agent_answers(self) -> bool:
        """Return whether tracing is enabled and an Agent answers."""
        if not (self.agent_url and self.trace_enabled):
            return False
        import httpx

        try:
            return bool(http.get(self.agent_url, "/info", AGENT_SECONDS).is_success)
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def send(self, gauges: Sequence[tuple[str, float, list[str]]]) -> str:
        """Send gauges (name, value, tags) and return why that failed, or an empty string.

        Without DD_API_KEY nothing is sent. A failure is described without the key.
        """
        if not gauges or not self.api_key:
            return ""
        import httpx

        # https://docs.datadoghq.com/api/latest/metrics/#submit-metrics: type 3 is a gauge.
        series = []
        for name, value, tags in gauges:
            points = [{"timestamp": int(time.time()), "value": value}]
            host = {"type": "host", "name": self.hostname}
            series.append(
                {
                    "metric": name,
                    "type": 3,
                    "points": points,
                    "tags": tags,
                    "resources": [host],
                }
            )
        try:
            httpx.post(
                f"{self.api_url}/api/v2/series",
                json={"series": series},
                headers={"DD-API-KEY": self.api_key},
                timeout=SEND_SECONDS,
                verify=ssl.create_default_context(),
            ).raise_for_status()
        except httpx.HTTPStatusError as error:
            return f"HTTP status {error.response.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return type(error).__name__
        return ""
