"""Connections to FalkorDB and to Valkey (or Redis), by redis-py."""

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from lib.common.environment import Environment

DEFAULT_PORTS = {"FALKORDB": 6379, "VALKEY": 6380}
CONNECT_SECONDS = 5.0


class Database(Environment):
    """Address and credentials of one database; ``name`` is the prefix of its variables."""

    name: str
    host: str = "localhost"
    port: int = Field(ge=1, le=65535)
    username: str = ""
    password: str = Field("", repr=False)
    tls: bool = False

    @classmethod
    def of(cls, name: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Return the database that ``NAME_HOST``, ``NAME_PORT`` and so on describe.

        ``name`` is FALKORDB or VALKEY. Raises InvalidConfiguration.
        """
        return cls.read(
            environ,
            f"{name}_",
            NAME=name,
            PORT=DEFAULT_PORTS[name],
        )

    @property
    def address(self) -> str:
        """Return ``host:port``."""
        return f"{self.host}:{self.port}"

    def client(self, timeout: float, **options: Any) -> Any:
        """Return a client that waits ``timeout`` seconds for a reply, which holds str, not bytes.

        ``options`` are further arguments of redis-py. Nothing is sent before the first command.
        """
        from redis import Redis

        return Redis(**self._options(timeout) | options)

    def async_client(self, timeout: float, **options: Any) -> Any:
        """Return a client for asyncio; see ``client``."""
        from redis.asyncio import Redis

        return Redis(**self._options(timeout) | options)

    def _options(self, timeout: float) -> dict[str, Any]:
        # redis-py's own retries take three seconds to report that nothing listens.
        # Its defaults check the certificate and the host name of a TLS server.
        return {
            "host": self.host,
            "port": self.port,
            "username": self.username or None,
            "password": self.password or None,
            "socket_timeout": timeout,
            "socket_connect_timeout": CONNECT_SECONDS,
            "retry": None,
            "protocol": 2,
            "ssl": self.tls,
            "decode_responses": True,
        }


def os_error(error: BaseException | None) -> OSError | None:
    """Return the first OSError among the causes of an error that redis-py or httpx raised."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
