"""Charts as SVG that the server draws: bars, curves, a Gantt of attempts, run lengths; each also as a table.

Positions are percentages across and pixels down, so a chart fills its place while its text keeps its size.
Colours are CSS classes (`c-KIND`), since the pages allow no inline style. Kinds that mean trouble are
hatched as well, so that no chart depends on colour. Pure.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from markupsafe import Markup

_KIND = re.compile(r"[a-z][a-z_-]*")
# A narrower bar or piece would not be seen, in percent of the width.
_NARROWEST = 0.6
_ZERO = timedelta(0)
# Heights of the charts, in pixels.
BARS = 160
LENGTHS = 170
# The lines of each hatched kind within a tile of 6 by 6 pixels.
_HATCHES = {
    "failed": "M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2",
    "refused": "M0,3 h6 M3,0 v6",
    "skipped": "M0,3 h6",
    "cancelled": "M3,0 v6",
    "waiting": "M-1,5 l2,2 M0,0 l6,6 M5,-1 l2,2",
}


class ChartSeries(NamedTuple):
    """One layer of stacked bars: its name, its kind (a CSS class), and a value for each bar."""

    name: str
    kind: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class LanePiece:
    """What a lane of a Gantt was doing, from `start` until `end`."""

    name: str
    kind: str
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of a Gantt: its pieces in order, and a note behind its name."""

    name: str
    pieces: Sequence[LanePiece] = field(default=())
    note: str = ""


class Dot(NamedTuple):
    """One run: its label, seconds, kind (a state), and page."""

    label: str
    seconds: float
    kind: str
    href: str


def bars(
    series: Sequence[ChartSeries],
    labels: Sequence[str],
    *,
    title: str,
    ticks: Sequence[str] | None = None,
    links: Sequence[str] | None = None,
) -> Markup:
    """Stacked bars, one per label; `ticks` are the shorter texts below some bars ("" for none).

    `links` lead from each bar and from the label of its row in the table. Those of the bars are for
    pointers only: a keyboard and a screen reader find the same links in the table.
    """
    totals = [sum(layer.values[at] for layer in series) for at in range(len(labels))]
    # Half of it is a whole number, too.
    top = 2 * _round_up(max([2, *totals]) / 2)
    base, slot = BARS - 20, 100 / max(len(labels), 1)
    lines, values = _rules(top, base, _number)
    drawn = list(lines)
    for at, label in enumerate(labels):
        below = 0.0
        for layer in series:
            value = layer.values[at]
            if not value:
                continue
            size = max(value / top * (base - 10), 1.5)
            y = base - below - size
            below += size
            x, width = (at + 0.12) * slot, 0.76 * slot
            place = f'x="{x:.2f}%" y="{y:.1f}" width="{width:.2f}%" height="{size:.1f}"'
            drawn.append(_block(title, layer.kind, place, f"{label}: {_number(value)} {layer.name}"))
    for at, tick in enumerate(ticks or ()):
        if tick:
            drawn.append(_tick((at + 0.5) * slot, BARS - 4, tick))
    drawn += values
    total = sum(totals)
    about = f"{_number(total)} in all"
    if total:
        peak = max(range(len(totals)), key=totals.__getitem__)
        about += f"; most at {labels[peak]}: {_number(totals[peak])}"
        parts = [(layer.name, sum(layer.values)) for layer in series]
        about += "; " + ", ".join(f"{_number(value)} {name}" for name, value in parts if value)
    rows = [
        [_linked(label, links[at] if links else ""), *(_number(layer.values[at]) for layer in series)]
        for at, label in enumerate(labels)
        if totals[at]
    ]
    legend = [(layer.name, layer.kind) for layer in series if any(layer.values)]
    heads = ["", *(layer.name for layer in series)]
    over = _targets(links, totals, labels)
    return _figure(title, about, BARS, drawn, legend, heads, rows, numbers_from=1, over=over)


def curves(series: Sequence[ChartSeries], labels: Sequence[str], *, title: str, unit: str = "") -> Markup:
    """Lines over the same labels; a value that is not known is NaN, and leaves a gap."""
    known = [value for layer in series for value in layer.values if not math.isnan(value)]
    top, base, slot = _round_up(max(known, default=0)), BARS - 20, 100 / max(len(labels), 1)

    def shown(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.3g}{unit}"

    drawn, values = _rules(top, base, shown)
    for layer in series:
        places = [
            (
                (at + 0.5) * slot,
                base - value / top * (base - 12),
                f"{labels[at]}: {value:.3g}{unit} {layer.name}",
            )
            for at, value in enumerate(layer.values)
            if not math.isnan(value)
        ]
        for (x, y, _), (next_x, next_y, _) in itertools.pairwise(places):
            drawn.append(
                Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}"/>').format(
                    _class(layer.kind), x, next_x, y, next_y
                )
            )
        drawn += [
            Markup('<circle class="{}" cx="{:.2f}%" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                _class(layer.kind), x, y, text
            )
            for x, y, text in places
        ]
    drawn += values
    last = [f"{layer.name} {shown(layer.values[-1])}" for layer in series if layer.values]
    rows: list[list[str | Markup]] = [
        [
            label,
            *("" if math.isnan(layer.values[at]) else f"{layer.values[at]:.3g}{unit}" for layer in series),
        ]
        for at, label in enumerate(labels)
    ]
    legend = [(layer.name, layer.kind) for layer in series]
    heads = ["", *(layer.name for layer in series)]
    return _figure(title, ", ".join(last) or "nothing yet", BARS, drawn, legend, heads, rows, numbers_from=1)


def gantt(lanes: Sequence[Lane], *, title: str, now: datetime) -> Markup:
    """Lanes below each other on one time line, which ends with the last piece."""
    pieces = [piece for lane in lanes for piece in lane.pieces]
    start = min((piece.start for piece in pieces), default=now)
    end = max((piece.end for piece in pieces), default=now)
    whole = max((end - start).total_seconds(), 0.001)
    row, drawn = 40, list[Markup]()
    height = row * len(lanes) + 24
    for at, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        anchor = "start" if at == 0 else "end" if at == 4 else "middle"
        text = "0" if at == 0 else f"+{short(timedelta(seconds=whole * share))}"
        drawn.append(
            Markup('<line class="rule" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>').format(
                share * 100, height - 20
            )
        )
        drawn.append(_tick(share * 100, height - 4, text, anchor, is_minor=at in (1, 3)))
    rows: list[list[str | Markup]] = []
    for at, lane in enumerate(lanes):
        y = at * row
        drawn.append(
            Markup('<text class="lane" x="0" y="{}">{}<tspan class="dim">{}</tspan></text>').format(
                y + 14, lane.name, f"  {lane.note}" if lane.note else ""
            )
        )
        for piece in lane.pieces:
            left = (piece.start - start).total_seconds() / whole * 100
            width = max((piece.end - piece.start).total_seconds() / whole * 100, _NARROWEST)
            left = min(left, 100 - width)
            place = f'x="{left:.2f}%" y="{y + 19}" width="{width:.2f}%" height="14" rx="2"'
            took = short(piece.end - piece.start)
            drawn.append(_block(title, piece.kind, place, f"{lane.name}: {piece.name} {took}"))
            rows.append([lane.name, piece.name, f"{piece.start:%Y-%m-%d %H:%M:%S}", took])
    totals: dict[str, timedelta] = {}
    kinds: dict[str, str] = {}
    for piece in pieces:
        totals[piece.name] = totals.get(piece.name, _ZERO) + (piece.end - piece.start)
        kinds.setdefault(piece.name, piece.kind)
    about = ", ".join(f"{name} {short(took)}" for name, took in totals.items()) or "nothing yet"
    legend = [(f"{name} {short(totals[name])}", kind) for name, kind in kinds.items()]
    return _figure(
        title, about, height, drawn, legend, ["", "what", "from (UTC)", "for"], rows, numbers_from=3
    )


def lengths(dots: Sequence[Dot], *, title: str) -> Markup:
    """How long runs took, oldest first, with lines at the median and the 95th percentile."""
    values = sorted(dot.seconds for dot in dots)
    top = _round_up(max(values, default=0))
    base = LENGTHS - 8
    lines, texts = _rules(top, base, _seconds)
    drawn = list(lines)

    def y_of(seconds: float) -> float:
        return base - seconds / top * (base - 14)

    about = "1 run" if len(dots) == 1 else f"{len(dots)} runs"
    if values:
        middle, high = percentile(values, 0.5), percentile(values, 0.95)
        about += f"; median {_seconds(middle)}, 95 % within {_seconds(high)}, longest {_seconds(values[-1])}"
        for kind, value in (("c-median", middle), ("c-most", high)):
            drawn.append(
                Markup('<line class="{}" x1="0" x2="100%" y1="{:.1f}" y2="{:.1f}"/>').format(
                    kind, y_of(value), y_of(value)
                )
            )
    for at, dot in enumerate(dots):
        x, y = (at + 0.5) * 100 / len(dots), y_of(dot.seconds)
        about_dot = f"{dot.label}: {dot.kind} after {_seconds(dot.seconds)}"
        if dot.kind == "succeeded":
            shape = Markup('<circle class="{}" cx="{:.2f}%" cy="{:.1f}" r="4"><title>{}</title></circle>')
            drawn.append(shape.format(_class(dot.kind), x, y, about_dot))
        else:
            # A square, so that it differs by shape as well.
            shape = Markup(
                '<svg x="{:.2f}%" y="{:.1f}" overflow="visible"><rect class="{}" x="-4.5" y="-4.5" '
                'width="9" height="9"><title>{}</title></rect></svg>'
            )
            drawn.append(shape.format(x, y, _class(dot.kind), about_dot))
    drawn += texts
    rows: list[list[str | Markup]] = [
        [_linked(dot.label, dot.href), dot.kind, _seconds(dot.seconds)] for dot in reversed(dots)
    ]
    seen = dict.fromkeys(dot.kind for dot in dots)
    legend = [(kind, kind) for kind in seen]
    if values:
        legend += [(f"median {_seconds(middle)}", "median"), (f"95 % within {_seconds(high)}", "most")]
    heads = ["scheduled for (UTC)", "state", "took"]
    return _figure(title, about, LENGTHS, drawn, legend, heads, rows, numbers_from=2)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the ordered values does not exceed."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def short(duration: timedelta) -> str:
    """A duration for people, in its two greatest units: `1.2s`, `4m 30s`, `2h 5m`, `3d 4h`."""
    return _seconds(max(duration.total_seconds(), 0.0))


def _seconds(seconds: float) -> str:
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    at = next(at for at, (_, size) in enumerate(units) if whole >= size)
    (unit, size), rest = units[at], units[at + 1 : at + 2]
    text = f"{whole // size}{unit}"
    for small, part in rest:
        if left := whole % size // part:
            text += f" {left}{small}"
    return text


def _figure(
    title: str,
    about: str,
    height: int,
    drawn: Iterable[Markup],
    legend: Sequence[tuple[str, str]],
    heads: Sequence[str],
    rows: Sequence[Sequence[str | Markup]],
    *,
    numbers_from: int,
    over: str | Markup = "",
) -> Markup:
    """The drawing with its name and description, a legend, and the data as a table.

    The table has numbers in the columns from `numbers_from` on.
    """
    nothing = Markup("")
    kinds = dict.fromkeys(kind for _, kind in legend if kind in _HATCHES)
    hatches = nothing.join(
        Markup(
            '<pattern id="{}" width="6" height="6" patternUnits="userSpaceOnUse">'
            '<path class="hatch" d="{}"/></pattern>'
        ).format(_hatch(title, kind), _HATCHES[kind])
        for kind in kinds
    )
    keys = nothing.join(
        Markup('<li><svg class="swatch" width="12" height="12" aria-hidden="true">{}</svg>{}</li>').format(
            _block(title, kind, 'x="0" y="0" width="12" height="12"', ""), name
        )
        for name, kind in legend
    )
    head = nothing.join(
        Markup('<th scope="col">{}</th>').format(name) if name else Markup("<td></td>") for name in heads
    )
    body = nothing.join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0],
            nothing.join(
                Markup("<td{}>{}</td>").format(Markup(' class="number"') if at >= numbers_from else "", cell)
                for at, cell in enumerate(row[1:], 1)
            ),
        )
        for row in rows
    )
    table = (
        Markup(
            '<details class="data"><summary>Show as a table</summary><div class="scroll" tabindex="0" '
            'role="region" aria-label="{}"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
            "</details>"
        ).format(f"{title}, as a table", head, body)
        if rows
        else nothing
    )
    return Markup(
        '<figure class="chart"><div class="plot"><svg role="img" aria-label="{}" width="100%" height="{}">'
        "<title>{}</title><desc>{}</desc><defs>{}</defs>{}</svg>{}</div><figcaption>"
        '<ul class="legend">{}</ul></figcaption>{}</figure>'
    ).format(f"{title}: {about}", height, title, about, hatches, nothing.join(drawn), over, keys, table)


def _block(title: str, kind: str, place: str, about: str) -> Markup:
    """A filled rectangle, hatched if its kind is; `place` is our own attributes."""
    where = Markup(place)  # noqa: S704 - made from numbers
    name = Markup("<title>{}</title>").format(about) if about else Markup("")
    found = Markup('<rect class="{}" {}>{}</rect>').format(_class(kind), where, name)
    if kind in _HATCHES:
        found += Markup('<rect class="over" fill="url(#{})" {}>{}</rect>').format(
            _hatch(title, kind), where, name
        )
    return found


def _rules(top: float, base: int, shown: Callable[[float], str]) -> tuple[list[Markup], list[Markup]]:
    """Horizontal lines at half and at the top of the scale, and their values, to draw over the rest."""
    lines = [Markup('<line class="axis" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(base)]
    values = []
    for share in (0.5, 1.0):
        y = base - share * (base - 12)
        lines.append(Markup('<line class="rule" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y))
        values.append(
            Markup('<text class="dim" x="0" y="{:.1f}">{}</text>').format(y - 2, shown(top * share))
        )
    return lines, values


def _tick(x: float, y: int, text: str, anchor: str = "middle", *, is_minor: bool = False) -> Markup:
    kind = "dim minor" if is_minor else "dim"
    return Markup('<text class="{}" x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _linked(text: str, href: str) -> str | Markup:
    return Markup('<a href="{}">{}</a>').format(href, text) if href else text


def _targets(links: Sequence[str] | None, totals: Sequence[float], labels: Sequence[str]) -> Markup:
    """A link over each bar; places are the grid's, since the pages allow no inline style."""
    if not links or not any(totals):
        return Markup()
    each = Markup().join(
        Markup('<a href="{}" tabindex="-1" title="{}: {}"></a>').format(href, label, _number(total))
        if total
        else Markup("<span></span>")
        for href, total, label in zip(links, totals, labels, strict=True)
    )
    return Markup('<div class="bar-links" aria-hidden="true">{}</div>').format(each)


def _class(kind: str) -> str:
    if _KIND.fullmatch(kind) is None:
        raise ValueError(f"{kind!r} is not a kind: lower-case letters only")
    return f"c-{kind}"


def _hatch(title: str, kind: str) -> str:
    """The id of a pattern; the title keeps two charts of a page apart."""
    return f"h{hashlib.blake2b(title.encode(), digest_size=4).hexdigest()}-{kind}"


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten, at which a scale ends."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value - 1e-12)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
