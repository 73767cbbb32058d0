"""The command line: ``memory add|search|episodes|forget|status|dead|retry|export|import|work|serve``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from . import observe, settings
from .service import Memories, NotFound, Refused
from .settings import Unavailable, WrongSetting

EPILOG = """\
exit:  0   done; also when a search finds nothing
       1   status: something is wrong, and is said
       64  the command line is wrong           65  what is to be added or imported cannot be
       66  there is nothing of that ID         69  FalkorDB, Valkey or the model does not answer, or is not set
       78  a variable holds what it cannot

variables, with their defaults (docs/memory.md says more):
  FALKORDB_HOST (localhost), _PORT (6379), _USERNAME, _PASSWORD, _TLS
  VALKEY_HOST (localhost), _PORT (6380), _USERNAME, _PASSWORD, _TLS
  OPENAI_API_KEY, OPENAI_BASE_URL, MEMORY_MODEL, MEMORY_SMALL_MODEL, MEMORY_MODEL_API (auto)
  MEMORY_EMBEDDING_MODEL (text-embedding-3-small), _DIM (1024), _BASE_URL, _API_KEY
  MEMORY_PROJECT, MEMORY_WORKERS (2), MEMORY_CONCURRENCY (5), MEMORY_ATTEMPTS (4), MEMORY_TIMEOUT (120),
  MEMORY_BACKOFF (2), MEMORY_LEASE (30)"""

CODES: dict[type[Exception], int] = {Refused: 65, NotFound: 66, Unavailable: 69, WrongSetting: 78}


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shape = argparse.RawTextHelpFormatter
    top = argparse.ArgumentParser("memory", description=__doc__, epilog=EPILOG, formatter_class=shape)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--project", default="", help="whose memory; that of the working directory by default")
    parts = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return parts.add_parser(name, help=about, description=about, parents=[common])

    add = command("add", "keep a memory; returns once it is in the queue")
    add.add_argument("text", help="what to remember, or - to read it from standard input")
    add.add_argument("--about", default="", help="where it comes from")
    add.add_argument("--at", default="", help="when it was true, as ISO 8601; now by default")
    add.add_argument("--id", default="", help="a UUID; adding the same one again does nothing")
    search = command("search", "search facts")
    search.add_argument("query")
    search.add_argument("--entities", action="store_true", help="search entities instead")
    search.add_argument("--limit", type=int, default=10)
    command("episodes", "list the newest memories, word for word").add_argument("--limit", type=int, default=10)
    forget = command("forget", "forget a memory, a fact or an entity")
    which = forget.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", default="", help="as the other commands show it")
    which.add_argument("--everything", action="store_true", help="this project's whole memory")
    command("status", "say what answers, what waits, and what is wrong")
    command("dead", "list the memories that could not be digested, and why")
    command("retry", "queue dead letters again").add_argument("id", nargs="*", help="of the memories; all by default")
    command("export", "print every memory as a line of JSON")
    load = command("import", "add what export printed; what is known already is left as it is")
    load.add_argument("file", help="or - for standard input")
    work = command("work", "digest what is queued, of all projects, until ended")
    work.add_argument("--once", action="store_true", help="end when every queue is empty")
    command("serve", "speak MCP on standard input and output, and digest what is queued beside")
    return top


def _lines(name: str) -> list[dict[str, Any]]:
    """Return the memories in a file of JSON lines. Raises Refused, naming the line."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeError) as error:
        raise Refused(f"{name} cannot be read: {error}") from None
    memories = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            memories.append({key: str(row.get(key, "")) for key in ("id", "text", "at", "about")})
        except (ValueError, AttributeError):
            raise Refused(f"line {number} of {name} is not an object in JSON") from None
    return memories


async def _import(memories: Memories, name: str) -> dict[str, Any]:
    made = [memories.make(**row) for row in _lines(name)]
    added = [(await memories.add(memory))["state"] for memory in made]
    return {
        "project": memories.project,
        "imported": len(added) - added.count("already known"),
        "known": added.count("already known"),
    }


async def _work(memories: Memories, *, once: bool) -> dict[str, Any]:
    from .worker import Worker, metrics

    memories.settings.need_model()
    reporting = asyncio.ensure_future(metrics(memories.queue))
    work = asyncio.ensure_future(Worker(memories.settings, memories.queue, memories.graph).run(until_empty=once))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        pass
    finally:
        reporting.cancel()
    return {"state": "ended"}


async def answer(options: argparse.Namespace, memories: Memories) -> dict[str, Any]:  # noqa: PLR0911 -- one a command
    """Do what the command line says and return the answer."""
    match options.command:
        case "add":
            text = sys.stdin.read() if options.text == "-" else options.text
            return await memories.add(memories.make(text, options.about, options.at, options.id))
        case "search":
            return await memories.search(options.query, options.limit, entities=options.entities)
        case "episodes":
            return await memories.episodes(options.limit)
        case "forget":
            return await (memories.forget_everything() if options.everything else memories.forget(options.id))
        case "retry":
            return await memories.retry(options.id)
        case "dead":
            return await memories.dead()
        case "import":
            return await _import(memories, options.file)
        case "work":
            return await _work(memories, once=options.once)
        case _:
            return await memories.status()


def show(said: dict[str, Any]) -> str:
    """Return an answer as lines for people: lists one entry a line, and the rest as name and value."""
    lines = []
    for name, value in said.items():
        if isinstance(value, list):
            lines += [f"{name}:" if value else f"{name}: none"]
            for row in value:
                fields = row.items() if isinstance(row, dict) else [("", row)]
                lines.append(
                    "  " + "  ".join(f"{key} {part}".strip() for key, part in fields if part not in ("", None))
                )
        elif isinstance(value, dict):
            lines.append(f"{name}: " + ", ".join(f"{key} {part}" for key, part in value.items() if part is not None))
        else:
            lines.append(f"{name}: {value}")
    return "\n".join("".join(sign if sign.isprintable() else " " for sign in line) for line in lines)


async def _main(options: argparse.Namespace) -> int:
    chosen = settings.read(options.project)
    if options.command == "serve":
        from .server import serve

        await serve(chosen)
        return 0
    memories = Memories(chosen)
    try:
        if options.command == "export":
            async for memory in memories.export():
                print(json.dumps(memory, ensure_ascii=False))
            return 0
        said = await answer(options, memories)
    finally:
        await memories.close()
    print(json.dumps(said, ensure_ascii=False) if options.json else show(said))
    return 1 if said.get("problems") else 0


def main() -> int:
    """Run the command line and return its exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        options = parser().parse_args()
    except SystemExit as stop:
        return 64 if stop.code else 0  # argparse's own 2 says nothing
    try:
        return asyncio.run(_main(options))
    except KeyboardInterrupt:
        return 130
    except tuple(CODES) as error:
        print(
            json.dumps({"error": str(error)}) if getattr(options, "json", False) else f"memory: {error}",
            file=sys.stderr,
        )
        return CODES[type(error)]


def run() -> None:
    """Run the command line and end, without waiting for threads of libraries."""
    code = main()
    observe.end()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
