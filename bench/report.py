"""What came out: bench.json, and from it alone table.md and bench.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nestlearn.disk import atomic_write

from .harness import Measured

Document = dict[str, Any]
DASH = "—"


def write(document: Document, out: Path) -> None:
    """Put bench.json, table.md and bench.png into the folder, each whole or not at all."""
    from .figure import draw, drawn

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False)
    atomic_write(out / "bench.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    atomic_write(
        out / "table.md", lambda path: path.write_text(table(document) + "\n", encoding="utf-8")
    )
    if drawn(document):
        draw(document, out / "bench.png")


def read(path: Path) -> Document:
    """The document in a bench.json; ValueError if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no bench.json ({error!r}): measure again") from error
    return document


def table(document: Document) -> str:
    """All of a document as Markdown."""
    records = document["records"]
    baselines = document["baselines"]
    parts = [_head(document)]
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    for kind in kinds:
        of_kind = [r for r in records if r["kind"] == kind]
        for batch in dict.fromkeys(r.get("batch") for r in of_kind):
            same = [r for r in of_kind if r.get("batch") == batch]
            parts.append(_section(kind, same, baselines))
    notes: dict[str, dict[str, None]] = {}  # contestants by note, each once
    for r in records:
        if r.get("note"):
            notes.setdefault(r["note"], {})[r["contestant"]] = None
    lines = [f"* {'; '.join(names)}: {note}." for note, names in notes.items()]
    lines += [f"* {line}." for line in document["skipped"]]
    reasons = sorted({r["dropped"] for r in records if r["dropped"]})
    if reasons:
        lines.append(f"* {DASH}: not measured ({'; '.join(reasons)}).")
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _head(document: Document) -> str:
    m, rounds = document["machine"], document["settings"]["rounds"]
    software = ", ".join(f"{name} {v}" for name, v in document["versions"].items())
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']:g} GiB; "
        f"{m['os']}; {software}; commit {document['commit'] or 'unknown'}; {document['date']}; "
        f"`{document['command']}`. One process, {rounds} round{'s' * (rounds > 1)}, each in "
        "another order; medians of the rounds ± half their range; float32."
    )


def _section(kind: str, records: Sequence[Measured], baselines: Sequence[str]) -> str:
    first = records[0]
    legend = first["unit"] if first["unit"] != "%" else "counted matrix products, % of the peak"
    if first.get("width"):
        what = f"width {first['width']}, {first['heads']} heads, batch {first['batch']}"
        legend += f"; {what}, chunk {first['chunk']}"
    if first["kind"] == "decode":
        legend += "; one token at a time, at a position in the stream"
    ours = [r["contestant"] for r in records if r.get("ours")]
    others = [b for b in baselines if any(r["contestant"] == b for r in records)]
    if first["kind"] == "training step" and len({r["contestant"] for r in records}) > 1:
        others = [records[-1]["contestant"]]  # the models: ours to the other
    if first["unit"] == "%":
        others = []
    if others and ours:
        better = "higher" if "/s" in first["unit"] and first["unit"] != "s/step" else "lower"
        legend += f"; in brackets, {better} is better, the ratio to {', to '.join(others)}"
    rows = _rows(records, others)
    return f"**{kind[0].upper()}{kind[1:]}** ({legend})\n\n{_markdown(rows)}"


def _rows(records: Sequence[Measured], others: Sequence[str]) -> list[list[str]]:
    """The header and one row for each contestant (and metric, where it has several)."""
    lengths = sorted({r["T"] for r in records if r["T"] is not None})
    by = {(_name(r), r["T"]): r for r in records}
    names = dict.fromkeys(_name(r) for r in records)
    head = ["contestant", "parameters", *(f"{n:,}" for n in lengths)]
    rows = [head if lengths else [*head, "value"]]
    for name in names:
        cells = []
        for length in lengths or [None]:
            record = by.get((name, length))
            cells.append(
                "" if record is None else _cell(record, [by.get((o, length)) for o in others])
            )
        sizes = [r["parameters"] for r in records if _name(r) == name and "parameters" in r]
        rows.append([name, f"{sizes[0]:,}" if sizes else "", *cells])
    if not any(row[1] for row in rows[1:]):
        rows = [[row[0], *row[2:]] for row in rows]
    return rows


def _name(record: Measured) -> str:
    return record["contestant"] + (f", {record['metric']}" if record["unit"] == "%" else "")


def _cell(record: Measured, others: Iterable[Measured | None]) -> str:
    """Median ± half the range in %, and the ratios to the others."""
    if record["median"] is None:
        return DASH
    text = number(record["median"])
    if record["rounds"] > 1:
        half = 50 * (record["high"] - record["low"]) / record["median"]
        text += f" ± {half:.0f} %"
    shown = [r for r in others if r is not record]
    if not record.get("ours") or not shown:
        return text
    return f"{text} ({', '.join(ratio(record, other) for other in shown)})"


def ratio(record: Measured, other: Measured | None) -> str:
    """The median of the ratios within the rounds, as text."""
    pairs = list(zip(record["values"], other["values"])) if other else []
    return f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else DASH


def number(value: float) -> str:
    """Four digits or all before the point."""
    digits = max(0, 3 - len(f"{abs(value):.0f}") + (abs(value) < 1))
    return f"{value:,.{digits}f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines: list[str] = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)
