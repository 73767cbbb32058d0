"""Start ddtrace in each Python below ddtrace-run that has it, if a Datadog Agent answers.

Datadog's own file of this name prints ``No module named 'ddtrace'`` in every other Python, such as
that of a project's venv. Without an Agent, ddtrace logs errors in each program and delays its exit
by three seconds.
"""

import os
import sys


def _agent_answers() -> bool:
    import socket
    from urllib.parse import urlsplit

    url = urlsplit(os.environ.get("DD_TRACE_AGENT_URL") or "")
    try:
        if url.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as agent:
                agent.connect(url.path)
            return True
        host = url.hostname or os.environ.get("DD_AGENT_HOST")
        port = url.port or int(os.environ.get("DD_TRACE_AGENT_PORT") or 8126)
        if not host:
            return False
        socket.create_connection((host, port), timeout=0.25).close()
    except (OSError, ValueError):
        return False
    return True


def _start() -> None:
    from importlib.machinery import PathFinder

    if os.environ.get("DD_TRACE_ENABLED", "true").lower() in ("false", "0"):
        return
    # A namespace package, such as a directory named ddtrace, has no loader.
    found = PathFinder.find_spec("ddtrace")
    if found is None or found.loader is None:
        return
    if _agent_answers():
        import logging

        # It warns of command lines from which it cannot guess the service, such as -m venv .venv.
        logging.getLogger("ddtrace.internal.settings").setLevel(logging.ERROR)
        import ddtrace.auto  # noqa: F401 -- the import starts tracing
    else:
        for name in (
            "DD_TRACE_ENABLED",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED",
            "DD_REMOTE_CONFIGURATION_ENABLED",
        ):
            os.environ[name] = "false"


def _import_hidden() -> None:
    """Import the sitecustomize that this one hides, such as Debian's."""
    own = os.path.dirname(os.path.abspath(__file__))
    path, module = sys.path[:], sys.modules.pop("sitecustomize", None)
    sys.path[:] = [entry for entry in path if os.path.abspath(entry) != own]
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if module:
            sys.modules["sitecustomize"] = module
    finally:
        sys.path[:] = path


_import_hidden()
_start()
