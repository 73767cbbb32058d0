"""``restore``: put a backup back into the stack, with the server stopped while its own database and files come back."""

from __future__ import annotations

from pipeline.engine import Engine
from pipeline.errors import NoStack, RestoreStopped
from pipeline.report import ok, say
from pipeline.settings import Settings
from pipeline.stack import life
from pipeline.stack.runner import Runner

SERVERS_OWN = ("opencode", "files")
"""What of a backup is the server's: the rest are databases, which run on while they are restored."""


def restore(
    settings: Settings,
    engine: Engine,
    backup: str = "",
    *,
    only: str = "",
    replace: bool = False,
    dry_run: bool = False,
) -> None:
    """Restore a backup (the newest when empty), or of it the parts ``only``, and start the server again.

    Raises NoStack, RestoreStopped, StackBusy, PartDown.
    """
    run = life.of(settings, engine)
    if not run.state("backup").running:
        raise NoStack("there is no backup role to restore with", "inv up starts it.")
    which = [backup] if backup else []
    words = ["restore", *which, *(["--only", only] if only else []), *(["--replace"] if replace else [])]
    stops = not only or any(part in only for part in SERVERS_OWN)
    if dry_run and stops:
        # A restore refuses a database in use, and looks no further: the backup at least can be read back.
        _run(run, "verify", *which)
        say("restore: would stop the server, and start it afterwards")
        return
    if dry_run:
        _run(run, *words, "--dry-run")
        return
    with life.alone(settings):
        if stops:
            run.end("opencode")
            ok("the server is stopped")
        try:
            _run(run, *words)
        finally:
            if stops:
                run.start("opencode")
                life.wait(run, settings, "opencode")
                ok("the server is up again")
        # What is there now is what somebody wanted: an upgrade that was interrupted before has nothing to undo.
        run.note.unlink(missing_ok=True)


def _run(run: Runner, *words: str) -> None:
    """Run the backup's command line, its words shown as they come. Raises RestoreStopped."""
    done = run.backup(*words, timeout=None, shown=True)
    if not done.ok:
        raise RestoreStopped(
            f"backup {words[0]} ended with {done.code}", "It says why, and what to do, above; docs/backup.md says more."
        )
