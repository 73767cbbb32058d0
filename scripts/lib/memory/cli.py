"""Long-term memory of a project. Texts become entities and facts in FalkorDB."""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from lib.common.command_line import Parser, exit_now, printable
from lib.common.environment import InvalidConfiguration
from lib.memory import spans
from lib.memory.service import Answer, Invalid, Memories, NotFound, make_memory
from lib.memory.settings import Unavailable, read_settings

EPILOG = """\
exit codes:
  0   success, also when a search finds nothing
  1   status: there are problems
  64  wrong command line
  65  invalid input
  66  nothing has this ID
  69  FalkorDB, Valkey or the model is not available
  78  invalid configuration

environment variables (defaults); docs/memory.md describes them:
  FALKORDB_HOST (localhost), _PORT (6379), _USERNAME, _PASSWORD, _TLS
  VALKEY_HOST (localhost), _PORT (6380), _USERNAME, _PASSWORD, _TLS
  OPENAI_API_KEY, OPENAI_BASE_URL, MEMORY_MODEL, MEMORY_SMALL_MODEL, MEMORY_MODEL_API (auto)
  MEMORY_EMBEDDING_MODEL (text-embedding-3-small), _DIM (1024), _BASE_URL, _API_KEY
  MEMORY_PROJECT, MEMORY_WORKERS (2), MEMORY_CONCURRENCY (5), MEMORY_ATTEMPTS (4),
  MEMORY_TIMEOUT (120), MEMORY_MAX_TOKENS (16384), MEMORY_BACKOFF (2), MEMORY_LEASE (30)"""

EXIT_CODES: dict[type[Exception], int] = {
    Invalid: os.EX_DATAERR,
    NotFound: os.EX_NOINPUT,
    Unavailable: os.EX_UNAVAILABLE,
    InvalidConfiguration: os.EX_CONFIG,
}
MAX_LIMIT = 1000


def limit(text: str) -> int:
    """Parse --limit."""
    if not text.isdecimal() or not 0 < int(text) <= MAX_LIMIT:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_LIMIT}")
    return int(text)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "memory",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    shared = Parser(add_help=False)
    shared.add_argument(
        "--json",
        action="store_true",
        help="print the answer as one line of JSON",
    )
    shared.add_argument(
        "--project", default="", help="project; by default that of the working directory"
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
    )

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[shared],
        )

    add = command("add", "store a memory; returns when it is in the queue")
    add.add_argument("text", help="text to remember, or - for standard input")
    add.add_argument(
        "--about",
        default="",
        help="source of the text",
    )
    add.add_argument(
        "--at",
        default="",
        help="time in ISO 8601; now by default",
    )
    add.add_argument(
        "--id",
        default="",
        help="UUID; adding the same ID again does nothing",
    )
    search = command("search", "search facts")
    search.add_argument("query")
    search.add_argument(
        "--entities",
        action="store_true",
        help="search entities instead",
    )
    episodes = command("episodes", "list the newest memories word for word")
    for listing in (search, episodes):
        listing.add_argument(
            "--limit",
            type=limit,
            default=10,
            help="maximum number of results",
        )
    forget = command("forget", "delete a memory, a fact or an entity")
    target = forget.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "id",
        nargs="?",
        default="",
        help="ID that another command printed",
    )
    target.add_argument(
        "--everything",
        action="store_true",
        help="the whole memory of the project",
    )
    command("status", "show the state of queue, graph and model, and problems")
    command("dead", "list dead letters: memories that cannot be ingested, with the reason")
    retry = command("retry", "queue dead letters again")
    retry.add_argument(
        "id",
        nargs="*",
        help="IDs of memories; all by default",
    )
    command("export", "print every memory as a line of JSON")
    load = command("import", "add the memories of an export; known ones are skipped")
    load.add_argument("file", help="file, or - for standard input")
    work = command("work", "run a worker for all projects until it is stopped")
    work.add_argument(
        "--once",
        action="store_true",
        help="exit when all queues are empty",
    )
    command("serve", "run the MCP server on standard input and output, and a worker")
    return parser


def read_text(name: str) -> str:
    """Return the content of a file, or of standard input for ``-``. Raises Invalid."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeError) as error:
        raise Invalid(f"cannot read {name}: {error}") from None


async def import_file(memories: Memories, name: str) -> Answer:
    """Add the memories in a file with lines of JSON. Raises Invalid."""
    parsed = []
    for number, line in enumerate(read_text(name).splitlines(), 1):
        try:
            row = json.loads(line)
            fields = {
                field: str(row.get(field, ""))
                for field in (
                    "text",
                    "about",
                    "at",
                    "id",
                )
            }
        except (ValueError, AttributeError):
            raise Invalid(f"{name}, line {number}: not a JSON object") from None
        parsed.append(make_memory(**fields))
    states = [(await memories.add(memory, given=True))["state"] for memory in parsed]
    known = states.count("already known")
    return {
        "project": memories.project,
        "imported": len(states) - known,
        "known": known,
    }


async def work(memories: Memories, *, once: bool) -> Answer:
    """Run a worker until SIGTERM, or until all queues are empty."""
    from lib.memory.worker import Worker, send_metrics

    memories.settings.require_model()
    metrics = asyncio.ensure_future(send_metrics(memories.queue))
    worker = Worker(memories.settings, memories.queue, memories.graph)
    task = asyncio.ensure_future(worker.run(until_empty=once))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        pass
    finally:
        metrics.cancel()
    return {"state": "stopped"}


async def export(memories: Memories) -> Answer:
    """Print every memory as a line of JSON."""
    async for memory in memories.export():
        print(json.dumps(memory, ensure_ascii=False))
    return {}


async def execute(options: argparse.Namespace, memories: Memories) -> Answer:
    """Run a command and return its answer."""
    match options.command:
        case "add":
            text = read_text("-") if options.text == "-" else options.text
            memory = make_memory(text, options.about, options.at, options.id)
            result = memories.add(memory, given=bool(options.id))
        case "search":
            result = memories.search(
                options.query,
                options.limit,
                entities=options.entities,
            )
        case "episodes":
            result = memories.episodes(options.limit)
        case "forget" if options.everything:
            result = memories.forget_everything()
        case "forget":
            result = memories.forget(options.id)
        case "retry":
            result = memories.retry(options.id)
        case "import":
            result = import_file(memories, options.file)
        case "export":
            result = export(memories)
        case "work":
            result = work(memories, once=options.once)
        case command:
            result = getattr(memories, command)()
    return await result


def render(answer: Answer, indent: int | None) -> str:
    """Return an answer as JSON, without characters that control a terminal."""
    lines = json.dumps(
        answer,
        ensure_ascii=False,
        indent=indent,
    ).splitlines()
    return "\n".join(printable(line) for line in lines)


async def run_command(options: argparse.Namespace) -> int:
    """Run the command and print its answer; return the exit code."""
    settings = read_settings(options.project)
    if options.command == "serve":
        from lib.memory.mcp_server import serve

        await serve(settings)
        return 0
    memories = Memories(settings)
    try:
        answer = await execute(options, memories)
    finally:
        await memories.close()
    if answer:
        print(render(answer, None if options.json else 2))
    return 1 if answer.get("problems") else 0


def main() -> None:
    """Run the command line and exit, without waiting for threads of libraries."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    options = build_parser().parse_args()
    try:
        code = asyncio.run(run_command(options))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        message = json.dumps({"error": str(error)}) if options.json else f"memory: {error}"
        print(message, file=sys.stderr)
    spans.stop()
    exit_now(code)
