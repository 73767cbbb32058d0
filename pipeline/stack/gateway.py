"""The gateway, which clients reach instead of the server: its URL, and whether it answers."""

from __future__ import annotations

import base64
import http.client
import ssl
from http import HTTPStatus

from pipeline.core.settings import Stack
from pipeline.engines.container import WORK

ANSWER_SECONDS = 5


def host(stack: Stack) -> str:
    """Return the name or address that clients use besides localhost."""
    return stack.host or stack.address.replace("0.0.0.0", "localhost")  # noqa: S104


def url(stack: Stack) -> str:
    """Return the URL for clients."""
    scheme = "http" if stack.tls == "none" else "https"
    return f"{scheme}://{host(stack)}:{stack.port}"


def page(stack: Stack) -> str:
    """Return the page of the web interface where /workspace is the project.

    Without its path in the URL, the web interface of OpenCode 1.18 lists the home directory.
    """
    workspace = base64.urlsafe_b64encode(WORK.encode()).decode().rstrip("=")
    return f"{url(stack)}/{workspace}"


def problem(stack: Stack, user: str, password: str) -> str:
    """Ask for the server's health through the published port; return what is wrong, or ""."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers = {"Host": host(stack), "Authorization": f"Basic {token}"}
    connection = _connection(stack)
    try:
        connection.request("GET", "/global/health", headers=headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{stack.address}:{stack.port} does not answer: {error}"
    finally:
        connection.close()
    return "" if status == HTTPStatus.OK else f"the server's health has status {status}"


def _connection(stack: Stack) -> http.client.HTTPConnection:
    """Return a connection that asks no proxy and checks no certificate: it is this machine."""
    address = stack.address.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    if stack.tls == "none":
        return http.client.HTTPConnection(address, stack.port, timeout=ANSWER_SECONDS)
    context = ssl._create_unverified_context()  # noqa: S323, SLF001
    return http.client.HTTPSConnection(address, stack.port, timeout=ANSWER_SECONDS, context=context)
