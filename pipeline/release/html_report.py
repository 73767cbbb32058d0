"""The history as a self-contained HTML page: the last nights, trends, changes, the last failure."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.console import ok
from pipeline.core.errors import printable
from pipeline.core.settings import ROOT
from pipeline.release import history
from pipeline.release.history import Record

NIGHTS = 30
"""How many nights and changes are shown."""

LETTERS = {
    "released": "R",
    "unchanged": "=",
    "failed": "F",
    "skipped": "S",
}
"""What a night's square contains, so that outcomes differ by more than their colour."""

CHANGES = ["night", "release", "rollback", "push"]
"""The kinds of records that are listed as changes."""

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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>opencode-server: nights</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>{style}</style>
</head>
<body>
<h1>opencode-server</h1>
<p>{last}</p>
<p class="soft">{counts}; times are UTC.{damaged}</p>
<section><h2>The last {nights} nights</h2><ol class="nights">{squares}</ol></section>
<div class="plots">{plots}</div>
<section><h2>What changed</h2>{changes}</section>
{failure}
</body>
</html>
"""

SQUARE = '<li class="{outcome}" title="{when}: {summary}">{letter}</li>'

CHANGE = """<div class="night"><span class="soft">{when}</span><b class="{outcome}">{outcome}</b>
<span>{summary}</span></div>"""

FAILURE = """<section><h2>The last failure</h2>
<p>{when}, {summary}</p>
<pre>{details}</pre></section>"""

PLOT = """<section><h2>{title}</h2>
<p class="soft">{newest:,.1f} {unit} now, {least:,.1f} to {most:,.1f}</p>
<svg viewBox="0 -8 320 150" role="img">
<polyline points="{line}" fill="none" stroke="var(--blue)" stroke-width="2"/>{dots}
<text y="138">{first}</text>
<text x="320" y="138" text-anchor="end">{last}</text></svg></section>"""

EMPTY_PLOT = '<section><h2>{title}</h2><p class="soft">Nothing measured yet.</p></section>'

DOT = """<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--blue)">
<title>{when}: {value:,.1f} {unit}</title></circle>"""


def write(output: str) -> Path:
    """Write the page to ``output``, relative to the repository; return its path."""
    path = ROOT / output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(*history.read()), encoding="utf-8")
    ok(f"report: {path}")
    return path


def page(records: Sequence[Record], damaged: int = 0) -> str:
    """Return the page; ``damaged`` is the number of lines of the history that are not records."""
    nights = [record for record in records if record["kind"] == "night"][-NIGHTS:]
    counts = Counter(record["outcome"] for record in nights)
    changes = [
        record
        for record in records
        if record["kind"] in CHANGES and record.get("outcome") != "unchanged"
    ]
    plots = (
        plot(records, "Image size", "size", "MB", 1e6),
        plot(records, "Build", "build_seconds", "s"),
        plot(records, "Time to healthy", "ready_seconds", "s"),
    )
    last = "There was no night yet."
    if nights:
        last = _fill("The last night ended {when}: <b class='{outcome}'>{outcome}</b>", nights[-1])
    return PAGE.format(
        style=STYLE,
        last=last,
        counts=", ".join(f"{counts[name]} {name}" for name in LETTERS if counts[name]),
        damaged=f" {damaged} damaged lines of the history are ignored." if damaged else "",
        nights=len(nights),
        squares="".join(_fill(SQUARE, record) for record in nights),
        plots="".join(plots),
        changes="".join(_fill(CHANGE, record) for record in changes[: -NIGHTS - 1 : -1])
        or "Nothing yet.",
        failure=_last_failure(records),
    )


def plot(
    records: Sequence[Record],
    title: str,
    key: str,
    unit: str,
    divisor: float = 1,
) -> str:
    """Return a line chart of the last values of ``key``, divided to be in ``unit``, as SVG."""
    points = [record for record in records if record.get(key) is not None][-NIGHTS:]
    if not points:
        return EMPTY_PLOT.format(title=title)
    values = [record[key] / divisor for record in points]
    least, most = min(values), max(values)
    step = 320 / max(1, len(points) - 1)
    line = []
    dots = []
    for index, value in enumerate(values):
        x = step * index
        y = 120 - 120 * (value - least) / (most - least or 1)
        line.append(f"{x:.1f},{y:.1f}")
        dots.append(DOT.format(x=x, y=y, when=_when(points[index]), value=value, unit=unit))
    return PLOT.format(
        title=title,
        newest=values[-1],
        unit=unit,
        least=least,
        most=most,
        line=" ".join(line),
        dots="".join(dots),
        first=_when(points[0])[:10],
        last=_when(points[-1])[:10],
    )


def _last_failure(records: Sequence[Record]) -> str:
    for record in reversed(records):
        if record.get("outcome") == "failed":
            return _fill(FAILURE, record)
    return ""


def _fill(template: str, record: Record) -> str:
    """Fill in what a template shows of a record, escaped for HTML."""
    outcome = record.get("outcome") or record["kind"]
    details = [record.get("tag", ""), history.brief(record)]
    summary = ": ".join(filter(None, details)) or outcome
    return template.format(
        when=_when(record),
        letter=LETTERS.get(outcome, ""),
        outcome=html.escape(outcome),
        summary=html.escape(summary).replace(" -&gt; ", " \N{RIGHTWARDS ARROW} "),
        details=html.escape(printable(record.get("details") or "It left no log.")),
    )


def _when(record: Record) -> str:
    """Return the date and time to the minute."""
    return html.escape(str(record.get("at", "")).replace("T", " ")[:16])
