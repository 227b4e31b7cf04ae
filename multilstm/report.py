"""Results as people look at them: tables, one HTML page, Markdown, a PNG.

The page needs no network: its plots are bars of CSS and lines of SVG. All
text from result files is escaped.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from multilstm.bench import BENCH_SCHEMA
from multilstm.errors import UserError
from multilstm.files import MISFITS, read_or_explain, replacing, write_text
from multilstm.ranking import by_shape
from multilstm.selection import BACKENDS, COMPARISON_SCHEMA

SCHEMAS = (BENCH_SCHEMA, COMPARISON_SCHEMA)
NAMES = {
    "ours": "multilstm",
    "our_layer": "Keras, multilstm's layer",
    "stock_competent": "stock Keras",
    "stock_tutorial": "stock Keras, tutorial",
    "native": "native loop",
    "native_compiled": "native loop, compiled",
    "as_it_is": "as it is",
    "accelerated": "accelerated",
}
_HEADINGS = (
    "rank",
    "backend",
    "what",
    "tokens/s",
    "ms/step",
    "p20-p80",
    "min",
    "compile",
    "MB",
    "GPU MB",
    "J per M tokens",
    "loss",
    "LSTM",
)


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads result files of `bench` and `compare`.

    Raises:
        UserError: If there is none, or one is missing, broken or has another
            schema: results of other versions are not comparable.
    """
    if not paths:
        raise UserError("A report needs result files; none was given.")
    results = []
    for path in paths:
        content = read_or_explain(path, partial(_load, path))
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema not in SCHEMAS:
            raise UserError(
                f"{path} must have a schema of {', '.join(SCHEMAS)}; it has "
                f"{schema!r}. Give a bench.json or a comparison.json of this "
                "version."
            )
        try:
            if not content["results"]:
                raise ValueError("it has no results")
            html_page([content])
        except MISFITS as error:
            raise UserError(
                f"{path} must hold a whole result of {schema!r}; it does not "
                f"({error!r}). Give the file as it was written."
            ) from error
        results.append(content)
    return results


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes())


def write_report(results: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Writes `report.html`, `report.md` and `report.png` into a folder."""
    paths = [out / f"report.{suffix}" for suffix in ("html", "md", "png")]
    write_text(paths[0], html_page(results))
    write_text(paths[1], markdown(results))
    _draw(results, paths[2])
    return paths


def cells(record: Mapping[str, Any]) -> list[str]:
    """What a row of a table says of a record, below `_HEADINGS`."""
    start = [
        str(record["rank"] or "-"),
        record["backend"],
        NAMES.get(record["variant"], record["variant"]),
    ]
    if "reason" in record:
        return [*start, *[""] * 9, record["reason"]]
    ms = record["step_time_ms"]
    note = record["kernel"]
    if not record["agrees"]:
        note = f"NOT RANKED: {record['disagrees']}; {note}"
    return [
        *start,
        f"{record['tokens_per_second']:,.0f}",
        f"{ms['median']:.4g}",
        f"{ms['p20']:.4g}-{ms['p80']:.4g}",
        f"{ms['min']:.4g}",
        f"{record['compile_time_seconds']:.1f} s",
        _number(record["peak_memory_mb"]),
        _number(record["peak_device_memory_mb"]),
        _number(record["joules_per_million_tokens"]),
        _number(record["losses"][-1], ".4f"),
        note,
    ]


def _number(value: float | None, form: str = ",.0f") -> str:
    """A number as text; nothing for what JSON has no number for."""
    return "" if value is None else format(value, form)


def _columns(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Those columns that say something in a row at least."""
    rows = [cells(record) for record in records]
    return [k for k in range(len(_HEADINGS)) if any(row[k] for row in rows)]


def bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table for each shape, of what fits a terminal."""
    tables = []
    for title, records in by_shape(result["results"]).items():
        columns = _columns(records)
        for left_out in ("min", "loss", "what"):
            place = _HEADINGS.index(left_out)
            told = len({record["variant"] for record in records}) > 1
            if place in columns and not (left_out == "what" and told):
                columns.remove(place)
        table = Table(
            title=Text(_title(title, result)),
            title_justify="left",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column in columns:
            heading = _HEADINGS[column]
            right = heading not in ("backend", "what", "LSTM")
            table.add_column(
                heading,
                justify="right" if right else "left",
                no_wrap=heading != "LSTM",
                min_width=12 if heading == "LSTM" else None,
                overflow="fold",
            )
        for record in _sorted(records):
            row = cells(record)
            row[-1] = row[-1].removeprefix(f"{record['backend']}: ")
            style = None if record.get("agrees") else "red"
            table.add_row(*(Text(row[k]) for k in columns), style=style)
        tables.append(table)
    return tables


def _sorted(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The ranked first, then the other times, then what failed."""

    def key(record: Mapping[str, Any]) -> tuple[float, float]:
        median = record.get("step_time_ms", {}).get("median", float("inf"))
        return record["rank"] or float("inf"), median

    return sorted(records, key=key)


def doctor_lines(result: Mapping[str, Any]) -> list[str]:
    """What the doctor found, a few lines for each backend."""
    lines = [f"{result['device']}, driver: {result['driver'] or 'none'}"]
    for record in result["backends"]:
        lines += ["", record["backend"]]
        if "versions" in record:
            defaults = _pairs(record["precision_defaults"])
            lines += [
                f"  versions   {_pairs(record['versions'])}",
                f"  libraries  {_pairs(record['libraries']) or 'none'}",
                f"  devices    {', '.join(record['devices'])}",
                f"  products   of float32 as they come: {defaults}",
            ]
        if record["kernel"] is None:
            lines.append(f"  not there  {record['reason']}")
            continue
        lines += [
            f"  LSTM       {record['kernel']}, "
            f"{record['times_reference']:g} times the speed of the plain loop",
            f"  exactness  outputs within {record['output_error']:.0e}, "
            f"gradients within {record['gradient_error']:.0e} of the plain "
            f"loop: {'right' if record['correct'] else 'WRONG'}",
        ]
    return lines


def _pairs(mapping: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}"
        for name, value in mapping.items()
        if value is not None
    )


def _split(
    results: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[Mapping[str, Any]]], list[Mapping[str, Any]]]:
    """Benchmarks by device, and comparisons."""
    devices: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result["schema"] == BENCH_SCHEMA:
            title = result["device"]
            if result["driver"]:
                title += f", driver {result['driver']}"
            devices.setdefault(title, []).append(result)
    return devices, [r for r in results if r["schema"] == COMPARISON_SCHEMA]


def _title(shape: str, result: Mapping[str, Any]) -> str:
    return f"{shape}, {result['dtype']}"


def _curves(
    comparison: Mapping[str, Any],
) -> dict[str, list[tuple[float, float]]]:
    """For each backend `(seconds so far, validation perplexity)`."""
    curves = {}
    for backend, record in comparison["results"].items():
        history = record.get("history", ())
        seconds = accumulate(row["seconds"] for row in history)
        values = (row["valid_perplexity"] for row in history)
        if history:
            curves[backend] = list(zip(seconds, values, strict=True))
    return curves


# Markdown


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same tables for a README."""
    devices, comparisons = _split(results)
    lines = []
    for device, of_device in devices.items():
        lines += [f"## {_one_line(device)}", ""]
        for result in of_device:
            for shape, records in by_shape(result["results"]).items():
                columns = _columns(records)
                lines += [f"{_one_line(_title(shape, result))}:", ""]
                lines.append(_markdown_row(_HEADINGS[k] for k in columns))
                lines.append("|" + " --- |" * len(columns))
                for record in _sorted(records):
                    row = cells(record)
                    lines.append(_markdown_row(row[k] for k in columns))
                lines.append("")
    for comparison in comparisons:
        lines += ["## Trained", ""]
        lines.append(_markdown_row(_COMPARISON_HEADINGS))
        lines.append("|" + " --- |" * len(_COMPARISON_HEADINGS))
        lines += map(_markdown_row, _comparison_rows(comparison))
        lines.append("")
    return "\n".join(lines)


def _markdown_row(texts: Iterable[str]) -> str:
    return "| " + " | ".join(map(_one_line, texts)) + " |"


def _one_line(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    text = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\|\[\]!*_`])", r"\\\1", text)


_COMPARISON_HEADINGS = (
    "backend",
    "device",
    "preset",
    "corpus",
    "epochs",
    "valid",
    "test",
    "seconds",
    "to target",
    "tokens/s",
)


def _comparison_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for backend, record in comparison["results"].items():
        if "error" in record:
            rows.append([backend, record["error"], *[""] * 8])
            continue
        history = record["history"]
        rows.append(
            [
                backend,
                record["device"],
                record["preset"],
                record["corpus"],
                str(len(history)),
                _number(record["valid_perplexity"], ".2f"),
                _number(record["test_perplexity"], ".2f"),
                f"{sum(row['seconds'] for row in history):,.0f}",
                _number(comparison["seconds_to_target"].get(backend)),
                _number(record["tokens_per_second"]),
            ]
        )
    return rows


# HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --jax: #7b4bb7;
  --torch: #d8502c; --tensorflow: #c98a00; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 70rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; min-width: 12rem; }
.off { opacity: .75; font-style: italic; }
.bar { display: grid; grid-template-columns: 12rem 1fr; gap: .5rem;
  align-items: center; font-size: .875rem; margin: .25rem 0; }
.track { position: relative; height: 1.5rem; }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 2px; }
.spread { position: absolute; top: 45%; height: 10%; background: currentColor;
  opacity: .7; }
.value { position: absolute; inset: 0 auto 0 .4rem; line-height: 1.5rem;
  font-variant-numeric: tabular-nums; color: #fff;
  text-shadow: 0 0 3px #000, 0 0 3px #000; }
.jax { background: var(--jax); } .torch { background: var(--torch); }
.tensorflow { background: var(--tensorflow); } .other { background: #888; }
svg { width: 100%; height: auto; max-width: 40rem; font-size: 12px; }
svg text { fill: currentColor; } svg .axis { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; }
@media (max-width: 30rem) { .bar { grid-template-columns: 1fr; gap: 0; } }
"""


def html_page(results: Sequence[Mapping[str, Any]]) -> str:
    """A page that needs nothing but itself."""
    devices, comparisons = _split(results)
    body = ["<h1>Training speed by backend</h1>"]
    for device, of_device in devices.items():
        body.append(f"<h2>{escape(device)}</h2>")
        for result in of_device:
            for shape, records in by_shape(result["results"]).items():
                body.append(f"<h3>{escape(_title(shape, result))}</h3>")
                body += _bars(records)
                body.append(_html_table(records))
            body.append(_environment(result))
    for comparison in comparisons:
        body.append("<h2>Perplexity against time</h2>")
        body.append(_svg_curves(_curves(comparison)))
        rows = map(_html_row, _comparison_rows(comparison))
        body.append(_table_tag(_COMPARISON_HEADINGS, rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"\n<title>multilstm: speed by backend</title>\n<style>{_STYLE}"
        "</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


_MEASURES = (
    ("tokens a second (line: p20 to p80)", "tokens_per_second"),
    ("seconds to compile", "compile_time_seconds"),
    ("peak memory of the process, MB", "peak_memory_mb"),
    ("peak memory of the GPU, MB", "peak_device_memory_mb"),
)


def _bars(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A group of bars for each measure that there is."""
    timed = [r for r in _sorted(records) if "reason" not in r]
    lines = []
    for title, name in _MEASURES:
        values = [record[name] for record in timed]
        if not any(values):
            continue
        spreads = [
            _spread(r) if name == "tokens_per_second" else None for r in timed
        ]
        most = max(
            [v for v in values if v is not None]
            + [high for spread in spreads if spread for high in spread[1:]]
        )
        lines.append(f"<p>{escape(title)}</p>")
        for record, value, spread in zip(timed, values, spreads, strict=True):
            if value is not None:
                lines.append(_bar(record, value, spread, most))
    return lines


def _spread(record: Mapping[str, Any]) -> tuple[float, float]:
    """The tokens a second of the slower and the faster windows."""
    ms = record["step_time_ms"]
    per_step = record["tokens_per_second"] * ms["median"]
    return per_step / ms["p80"], per_step / ms["p20"]


def _bar(
    record: Mapping[str, Any],
    value: float,
    spread: tuple[float, float] | None,
    most: float,
) -> str:
    def percent(number: float) -> str:
        return f"{100 * number / most:.2f}%"

    backend = record["backend"] if record["backend"] in BACKENDS else "other"
    name = NAMES.get(record["variant"], record["variant"])
    off = "" if record["agrees"] else " off"
    line = ""
    if spread:
        low, high = spread
        line = (
            f'<span class="spread" style="left:{percent(low)};'
            f'width:{percent(high - low)}"></span>'
        )
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if not record["agrees"]:
        shown += " (other numbers, not ranked)"
    return (
        f'<div class="bar{off}"><span>{escape(record["backend"])}, '
        f'{escape(name)}</span><span class="track">'
        f'<span class="fill {backend}" style="width:{percent(value)}"></span>'
        f'{line}<span class="value">{escape(shown)}</span></span></div>'
    )


def _html_table(records: Sequence[Mapping[str, Any]]) -> str:
    columns = _columns(records)
    rows = []
    for record in _sorted(records):
        row = cells(record)
        rows.append(
            _html_row([row[k] for k in columns], off=not record.get("agrees"))
        )
    return _table_tag([_HEADINGS[k] for k in columns], rows)


def _table_tag(headings: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


def _html_row(row: Iterable[str], *, off: bool = False) -> str:
    tag = '<tr class="off">' if off else "<tr>"
    return tag + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"


def _environment(result: Mapping[str, Any]) -> str:
    versions = {
        record["backend"]: record["versions"]
        for record in result["results"]
        if "versions" in record
    }
    rows = [_html_row([name, _pairs(of)]) for name, of in versions.items()]
    rows.append(_html_row(["protocol", _pairs(result["protocol"])]))
    return _table_tag(("environment", ""), rows)


def _svg_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>No backend finished an epoch.</p>"
    longest = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    height = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        across = 60 + 520 * x / longest
        return f"{across:.1f},{20 + 240 * (high - y) / height:.1f}"

    parts = [
        '<svg viewBox="0 0 600 300" role="img" aria-label="validation '
        'perplexity against seconds of training">',
        '<path class="axis" fill="none" d="M60 20V260H580"/>',
        f'<text x="55" y="24" text-anchor="end">{high:.1f}</text>',
        f'<text x="55" y="260" text-anchor="end">{low:.1f}</text>',
        f'<text x="580" y="280" text-anchor="end">{longest:,.0f} s</text>',
    ]
    for number, (backend, curve) in enumerate(curves.items()):
        color = f"var(--{backend})" if backend in BACKENDS else "currentColor"
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline style="stroke:{color}" points="{line}"/>')
        x, y = place(*curve[-1]).split(",")
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="4" style="fill:{color}"/>'
            f'<text x="{80 + 110 * number}" y="296" style="fill:{color}">'
            f"{escape(backend)}</text>"
        )
    return "".join([*parts, "</svg>"])


# PNG


@rc_context({"text.parse_math": False})  # a name may hold dollars
def _draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second with their spread; curves of perplexity."""
    devices, comparisons = _split(results)
    groups = [
        (f"{device}\n{_title(shape, result)}", records)
        for device, of_device in devices.items()
        for result in of_device
        for shape, records in by_shape(result["results"]).items()
    ]
    count = len(groups) + len(comparisons)
    figure = Figure(figsize=(8, 3 * max(count, 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(count, 1), squeeze=False)[:, 0]
    for axis, (title, records) in zip(axes, groups, strict=False):
        timed = [r for r in _sorted(records) if "reason" not in r][::-1]
        speeds = [record["tokens_per_second"] for record in timed]
        spreads = [_spread(record) for record in timed]
        # Where all windows took the same, rounding may leave less than none.
        errors = [
            [
                max(0.0, speed - low)
                for speed, (low, _) in zip(speeds, spreads, strict=True)
            ],
            [
                max(0.0, high - speed)
                for speed, (_, high) in zip(speeds, spreads, strict=True)
            ],
        ]
        labels = [", ".join(cells(record)[1:3]) for record in timed]
        if timed:
            axis.barh(labels, speeds, xerr=errors)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("tokens a second")
    for axis, comparison in zip(axes[len(groups) :], comparisons, strict=True):
        for backend, curve in _curves(comparison).items():
            axis.plot(*zip(*curve, strict=True), marker=".", label=backend)
            axis.legend()
        axis.set_xlabel("seconds of training")
        axis.set_ylabel("validation perplexity")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
