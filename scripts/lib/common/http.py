"""HTTP requests to services nearby, by httpx."""

import ssl
from typing import Any


def get(url: str, path: str, timeout: float, auth: Any = None) -> Any:
    """GET ``url`` + ``path`` and return httpx's Response; ``unix:///SOCKET`` is a URL too.

    ``auth`` is a pair of user name and password. No proxy is used and no redirect followed.
    ``timeout`` limits the connection and each wait for data, in seconds. Raises httpx.HTTPError
    and httpx.InvalidURL.
    """
    from httpx import Client, HTTPTransport

    scheme, _, rest = url.partition("://")
    socket = rest if scheme == "unix" else None
    # httpx's own default is certifi, which lacks the CA of a company's TLS proxy.
    transport = HTTPTransport(uds=socket, verify=ssl.create_default_context())
    base = "http://localhost" if socket else url.rstrip("/")
    with Client(transport=transport, timeout=timeout) as client:
        return client.get(base + path, auth=auth)
