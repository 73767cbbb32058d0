"""The command line of ``backup``."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lib.backup import manifest, process, settings
from lib.backup.console import age, log, size
from lib.backup.errors import Failure, Interrupted, full_disk, is_full
from lib.backup.remote import Remote
from lib.backup.settings import Settings
from lib.common.command_line import Parser

EPILOG = """\
parts:      falkordb, valkey, opencode (its database), files (auth.json, configuration and state)
exit code:  0 done; 64 wrong command line; 130, 143 a signal; docs/backup.md lists the failures
Environment variables configure it: BACKUP_REMOTE with RCLONE_CONFIG_*; see docs/backup.md."""

Options = argparse.Namespace


def run(options: Options, config: Settings) -> Any:
    """Copy, check, upload, read back."""
    from lib.backup import create, retention, status

    made = None
    try:
        made = create.backup(
            config,
            options.only or config.parts,
            create=options.create,
            dry_run=options.dry_run,
        )
    finally:
        if not options.dry_run:
            status.send_run(config, made)
    if made and options.prune:
        try:
            retention.prune(config, verified=made.id)
        except Failure as failure:  # the backup is good all the same
            log(f"prune failed: {config.hide(str(failure))}; {failure.remedy}")
    return asdict(made) if made else {}


def list_backups(options: Options, config: Settings) -> Any:
    """List all backups, also incomplete and damaged ones."""
    backups = manifest.catalog(Remote(config))
    if not options.json:
        for backup in backups:
            parts = " ".join(backup.parts)
            state = backup.fault or backup.note or "complete"
            columns = f"{age(backup.age_seconds):>7}  {size(backup.size):>8}  {backup.kind:6}"
            print(f"{backup.id}  {columns}  {parts}  {state}")
        if not backups:
            print("no backups")
    return [asdict(backup) | {"age_seconds": round(backup.age_seconds)} for backup in backups]


def verify(options: Options, config: Settings) -> Any:
    """Read a whole backup and compare each object with its manifest."""
    from lib.backup import retention

    verified = retention.verify(config, options.id, everything=options.all)
    return [backup.id for backup in verified]


def prune(options: Options, config: Settings) -> Any:
    """Remove what BACKUP_KEEP_* does not keep, after the newest copy of each part is verified."""
    from lib.backup import retention

    return [backup.id for backup in retention.prune(config, dry_run=options.dry_run)]


def restore(options: Options, config: Settings) -> Any:
    """Check everything, take a safety backup, restore, compare."""
    from lib.backup import restore

    return restore.restore(
        config,
        options.id,
        only=tuple(options.only or ()),
        to=dict(options.to),
        replace=options.replace,
        dry_run=options.dry_run,
    )


def status(options: Options, config: Settings) -> Any:
    """Report whether the newest backup is recent enough and the last run succeeded."""
    from lib.backup import status

    return status.status(config, quiet=options.json)


def schedule(_options: Options, config: Settings) -> Any:
    """Run backups at BACKUP_SCHEDULE until SIGTERM: the entrypoint of the backup container."""
    from lib.backup import schedule

    return schedule.serve(config)


def target(text: str) -> tuple[str, str]:
    """Return PART=WHERE as a pair."""
    part, _, where = text.partition("=")
    if part not in settings.PARTS or not where:
        raise argparse.ArgumentTypeError(f"{text} is not PART=WHERE")
    return part, where


def parts(text: str) -> list[str]:
    """Return the parts in a list that is separated by commas or spaces."""
    chosen = text.replace(",", " ").split()
    for part in chosen:
        if part not in settings.PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part}")
    return chosen


def parser() -> Any:
    """Return the parser of all commands."""
    top = Parser(
        "backup",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Back up FalkorDB, Valkey and OpenCode's state, and restore them.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, function: Callable[[Options, Settings], Any]) -> Any:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added.add_argument

    dry_run = {"action": "store_true", "help": "print what would be done, and change nothing"}
    only = {"type": parts, "metavar": "PARTS", "help": "default: all of BACKUP_PARTS"}
    backup_id = {"nargs": "?", "default": "latest", "help": "start of an ID; default: the newest"}
    to = {
        "type": target,
        "action": "append",
        "default": [],
        "metavar": "PART=WHERE",
    }

    add = command("run", run)
    add("--only", **only)
    add("--dry-run", **dry_run)
    add("--create", action="store_true", help="create the bucket or directory if it is missing")
    add("--prune", action="store_true", help="then remove what is not kept")
    add = command("restore", restore)
    add("id", **backup_id)
    add("--only", **only)
    add("--dry-run", **dry_run)
    add("--to", **to, help="falkordb=HOST:PORT, opencode=DIRECTORY, files=DIRECTORY")
    add("--replace", action="store_true", help="replace what the target holds")
    command("list", list_backups)
    add = command("verify", verify)
    add("id", **backup_id)
    add("--all", action="store_true", help="every complete backup")
    command("prune", prune)("--dry-run", **dry_run)
    command("status", status)
    command("schedule", schedule)
    return top


def main(words: Sequence[str]) -> int:
    """Run a command and return the exit code."""
    os.umask(0o077)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    options = parser().parse_args(words)
    config: Settings | None = None
    failure: Failure
    try:
        with process.interruptible():
            config = settings.load(os.environ)
            result = options.function(options, config)
    except Interrupted as interrupted:
        log(f"interrupted by signal {interrupted.code - 128}")
        return interrupted.code
    except OSError as error:
        if not is_full(error):
            raise
        failure = full_disk(error.filename or "the working directory")
    except Failure as error:
        failure = error
    else:
        if options.json:
            print(json.dumps(result))
        return 0
    name = type(failure).__name__
    what = config.hide(str(failure)) if config else str(failure)
    print(f"{name}: {what}\n  -> {failure.remedy}", file=sys.stderr)
    if options.json:
        result = {
            "error": name,
            "exit": failure.code,
            "output": what,
            "remedy": failure.remedy,
        }
        print(json.dumps(result))
    return failure.code
