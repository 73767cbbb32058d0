"""The history as one HTML page that needs nothing but itself: how the last nights went, trends, the last failure."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import history
from pipeline.report import ok
from pipeline.settings import ROOT

NIGHTS = 30
"""How many of the last nights are shown."""

PLOTS: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("Image size", "MB", lambda record: record["size"] / 1e6 if record.get("size") else None),
    ("Build", "s", lambda record: record.get("build_seconds")),
    ("Time to healthy", "s", lambda record: record.get("ready_seconds")),
)

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#d8dde6;--card:#fff;--back:#f4f6f9;--blue:#2563eb;
--released:#15803d;--unchanged:#94a3b8;--failed:#c81e1e;--skipped:#b45309}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3442;--card:#171c25;--back:#0e1218;
--blue:#6ea8fe;--released:#4ade80;--unchanged:#64748b;--failed:#f87171;--skipped:#fbbf24}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.05rem;margin:0 0 .6rem}
p{margin:.2rem 0}.soft{color:var(--soft)}section{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:1rem;margin:1rem 0}.nights{display:flex;flex-wrap:wrap;gap:4px;list-style:none;margin:0;padding:0}
.nights li{width:22px;height:30px;border-radius:4px;color:var(--card);font:700 13px/30px monospace;text-align:center}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:1rem;margin:1rem 0}
.plots section{margin:0}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{fill:var(--soft);font-size:11px}
.released{background:var(--released)}.unchanged{background:var(--unchanged)}.failed{background:var(--failed)}
.skipped{background:var(--skipped)}b.released,b.unchanged,b.failed,b.skipped{background:none}
b.released{color:var(--released)}b.failed{color:var(--failed)}b.skipped{color:var(--skipped)}b.unchanged{color:var(--soft)}
.night{display:grid;grid-template-columns:9.5rem 6rem 1fr;gap:0 1rem;padding:.45rem 0;border-top:1px solid var(--line)}
.night>*{min-width:0;overflow-wrap:anywhere}pre{overflow-x:auto;margin:0;font:12px/1.5 monospace;max-height:30rem}
@media(max-width:40rem){.night{grid-template-columns:1fr auto}.night>:last-child{grid-column:1/-1}}
"""


def write(output: str, records: Sequence[dict[str, Any]] | None = None) -> Path:
    """Write the page to ``output``, relative to the repository, and return where it is."""
    path, torn = ROOT / output, 0
    if records is None:
        records, torn = history.read()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(page(records, torn), encoding="utf-8")
    draft.replace(path)
    ok(f"report: {path}")
    return path


def page(records: Sequence[dict[str, Any]], torn: int = 0) -> str:
    """Return the page; ``torn`` is how many lines of the history could not be read."""
    nights = [record for record in records if record["kind"] == "night"][-NIGHTS:]
    events = [record for record in records if record["kind"] in {"night", "release", "rollback", "push"}]
    events = [record for record in events if record.get("outcome") != "unchanged"][-NIGHTS:]
    failures = [record for record in records if record.get("outcome") == "failed"]
    last = f"The last night ended {_when(nights[-1])}: {_outcome(nights[-1])}" if nights else "There was no night yet."
    lost = f" {torn} lines of the history are torn and left out." if torn else ""
    counts = {name: sum(record["outcome"] == name for record in nights) for name in LETTERS}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    squares = "".join(
        f'<li class="{record["outcome"]}" title="{_text(_when(record))}: {_text(_sentence(record))}">'
        f"{LETTERS[record['outcome']]}</li>"
        for record in nights
    )
    plots = "".join(f"<section><h2>{title}</h2>{plot(records, unit, of)}</section>" for title, unit, of in PLOTS)
    rows = "".join(
        f'<div class="night"><span class="soft">{_when(record)}</span>{_outcome(record)}'
        f"<span>{_text(_sentence(record))}</span></div>"
        for record in reversed(events)
    )
    failure = ""
    if failures:
        worst = failures[-1]
        failure = (
            f"<section><h2>The last failure</h2><p>{_when(worst)}, {_text(_sentence(worst))}</p>"
            f"<pre>{_text(worst.get('details') or 'It left no log.')}</pre></section>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>opencode-server: nights</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>opencode-server</h1><p>{last}</p><p class="soft">{told}; times are UTC.{lost}</p>'
        f'<section><h2>The last {len(nights)} nights</h2><ol class="nights">{squares}</ol></section>'
        f'<div class="plots">{plots}</div><section><h2>What changed</h2>{rows or "Nothing yet."}</section>{failure}'
        "</body></html>\n"
    )


LETTERS = {"released": "R", "unchanged": "=", "failed": "F", "skipped": "S"}
"""So that colour is not all that tells them apart."""


def plot(records: Sequence[dict[str, Any]], unit: str, of: Callable[[dict[str, Any]], float | None]) -> str:
    """Return a line of the last values that ``of`` finds, as SVG, with the scale and the newest value in words."""
    points = [(record, value) for record in records if (value := of(record)) is not None][-NIGHTS:]
    if not points:
        return '<p class="soft">Nothing measured yet.</p>'
    values = [value for _, value in points]
    low, high = min(values), max(values)
    room = (high - low) or abs(high) * 0.1 or 1
    low, high = max(0.0, low - room * 0.15), high + room * 0.15
    width, height, left = 320, 120, 42
    step = (width - left - 8) / max(1, len(points) - 1)
    digits = 0 if high > 99 else 1  # noqa: PLR2004
    spots = [(left + step * index, height * (high - value) / (high - low)) for index, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--blue)">'
        f"<title>{_when(record)}: {value:,.1f} {unit}</title></circle>"
        for (x, y), (record, value) in zip(spots, points, strict=True)
    )
    scale = "".join(
        f'<line x1="{left}" x2="{width}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{high - (high - low) * y / height:,.{digits}f}</text>'
        for y in (0, height // 2, height)
    )
    first, last = (_when(record)[:10] for record, _ in (points[0], points[-1]))
    days = f'<text x="{left}" y="{height + 18}">{first}</text>'
    days += f'<text x="{width}" y="{height + 18}" text-anchor="end">{last}</text>'
    return (
        f'<p class="soft">{values[-1]:,.1f} {unit} now, {min(values):,.1f} to {max(values):,.1f}</p>'
        f'<svg viewBox="0 -8 {width} {height + 30}" role="img">{scale}<polyline points="{line}" fill="none" '
        f'stroke="var(--blue)" stroke-width="2"/>{dots}{days}</svg>'
    )


def _sentence(record: dict[str, Any]) -> str:
    said = [record.get("outcome") or record["kind"], record.get("tag", ""), history.brief(record)]
    return (": ".join(part for part in said[1:] if part) or said[0]).replace(" -> ", " \N{RIGHTWARDS ARROW} ")


def _outcome(record: dict[str, Any]) -> str:
    word = record.get("outcome") or record["kind"]
    return f'<b class="{_text(word)}">{_text(word)}</b>'


def _when(record: dict[str, Any]) -> str:
    return _text(str(record.get("at", "")).replace("T", " ")[:16])


def _text(text: str) -> str:
    return html.escape(str(text))
