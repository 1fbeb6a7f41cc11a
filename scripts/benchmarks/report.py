"""What was found: as a table, as JSON, as a page with a chart, and against what was found before."""

import html
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

# Worse by more than this in every round is a regression.
TOLERANCE = 0.2


def document(bench, cases, options, seconds):
    return {
        "schema": 1,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "memory_gib": memory(),
                    "system": platform.system() + " " + platform.machine()},
        "versions": {"mongorekey": version(bench), "mongod": bench.client.server_info()["version"],
                     "python": platform.python_version()},
        "size": options.size, "rounds": options.rounds, "seconds": round(seconds),
        "cases": [case.json() for case in cases],
    }


def version(bench):
    return subprocess.run([bench.program, "--version"], capture_output=True, text=True).stdout.split()[-1]


def processor():
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def memory():
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def ratios(found):
    return [ratio for case in found["cases"] for ratio in case["ratios"]]


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values):
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else "one round"


def target(ratio):
    if ratio["target"] is None:
        return "", ""
    sign = "≥" if ratio["higher_is_better"] else "≤"
    return f"{sign} {number(ratio['target'])}", "reached" if ratio["reached"] else "missed"


def table(found):
    """One line per ratio, in columns."""
    rows = [("case", "ratio", "median", "spread", "target", "")]
    for ratio in ratios(found):
        rows.append((ratio["case"], ratio["name"], number(ratio["median"]), spread(ratio["values"]), *target(ratio)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def save(found, folder):
    folder.mkdir(exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "benchmarks.svg").write_text(chart(found))
    (folder / "benchmarks.md").write_text(page(found))


def page(found):
    machine, versions = found["machine"], found["versions"]
    lines = [
        "# Benchmarks", "",
        f"Made by `scripts/bench --save` on {found['at'][:10]}: {machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_gib']} GiB, {machine['system']}; mongorekey {versions['mongorekey']}, mongod "
        f"{versions['mongod']}, Python {versions['python']}; size {found['size']}, {found['rounds']} rounds, "
        f"{found['seconds'] // 60} minutes. Client, database and key API share the cores. Both sides of a ratio ran "
        "in the same run, in turns; a ratio is taken within a round. A figure on another machine is another "
        "figure: compare ratios.", "",
        "![The ratios, each with its spread and its target](benchmarks.svg)", "",
        "| case | ratio | median | spread | target | |", "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for ratio in ratios(found):
        lines.append(f"| {ratio['case']} | {ratio['name']} | {number(ratio['median'])} | {spread(ratio['values'])} | "
                     f"{' | '.join(target(ratio))} |")
    for case in found["cases"]:
        lines += ["", f"## {case['name']}", "", f"{case['what']}.", "", "| | median | spread | |", "| --- | ---: | --- | --- |"]
        lines += [f"| {side['name']} | {number(side['median'])} | {spread(side['values'])} | {side['unit']} |"
                  for side in case["sides"]]
    return "\n".join(lines) + "\n"


def chart(found):
    """How far each median is from its target: 1 is the target, to the right is better."""
    judged = [ratio for ratio in ratios(found) if ratio["target"]]
    width, row, left, top, most = 860, 26, 400, 40, 3.0
    height = top + row * len(judged) + 30
    scale = (width - left - 70) / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" role="img">',
        "<title>Ratios against their targets; 1 is the target, longer is better</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="20" fill="#444">times the target (longer is better)</text>',
    ]
    for index, ratio in enumerate(judged):
        values = [goodness(ratio, value) for value in [ratio["median"], *ratio["values"]]]
        y, length = top + index * row, min(values[0], most) * scale
        color = "#2a7" if ratio["reached"] else "#c53"
        low, high = (left + min(value, most) * scale for value in (min(values[1:]), max(values[1:])))
        label = html.escape(f"{ratio['case']}: {ratio['name']}")
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" fill="#222">{label}</text>',
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="14" fill="{color}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10}" y2="{y + 10}" stroke="#222" stroke-width="2"/>',
            f'<text x="{max(high, left + length) + 6:.1f}" y="{y + 14}" fill="#222">{number(values[0])}</text>',
        ]
    one = left + scale
    parts += [f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top - 6}" y2="{height - 20}" stroke="#222" stroke-dasharray="3 3"/>', "</svg>"]
    return "\n".join(parts) + "\n"


def goodness(ratio, value):
    return value / ratio["target"] if ratio["higher_is_better"] else ratio["target"] / value


def check(found, saved):
    """1 where a ratio is clearly worse than the saved one: noise spares the best round."""
    before = {(ratio["case"], ratio["name"]): ratio for ratio in ratios(saved)}
    regressions = []
    for ratio in ratios(found):
        old = before.get((ratio["case"], ratio["name"]))
        if old is not None and is_worse(ratio, old["median"]):
            regressions.append(f"{ratio['case']}: {ratio['name']}: {number(ratio['median'])}, was {number(old['median'])}")
    print("\n" + ("\n".join(["worse than before:", *regressions]) if regressions else "no worse than before"))
    return 1 if regressions else 0


def is_worse(ratio, before):
    if ratio["higher_is_better"]:
        return max(ratio["values"]) < before * (1 - TOLERANCE)
    return min(ratio["values"]) > before * (1 + TOLERANCE)
