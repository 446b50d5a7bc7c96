"""What a suite's pictures show, drawn on matplotlib's figures; `suite_plots` makes files of them.

Contestants keep one colour and one dash in all pictures: Okabe and Ito's colours, which colour-blind people
tell apart, and where there are more contestants than colours another dash. Every line and point bears its
name in ink, since the lighter colours are no colours for text, tied to it by a stroke of its own colour.
A loss far above the others is drawn at the upper edge, its value beside the name. A seed that diverged counts
as higher than any other, so the line of one whose median seed diverged ends where that did.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from scrimp.base import extras
from scrimp.base.ledger import TERMS
from scrimp.report.labels import front, place_names, spread_out
from scrimp.report.plan_bars import COLOURS
from scrimp.report.plan_picture import HATCHES
from scrimp.report.suite_cells import (
    Contestant,
    Document,
    amount,
    byte_unit,
    has_diverged,
    in_unit,
    median,
)

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = {"ours": "o", "peer": "s"}
BARS = {"ours": "#0072b2", "peer": "#8fb8d4"}
WHOSE = {"ours": "scrimp's own", "peer": "a peer's package"}
INK, FAINT = "#333333", "#dddddd"
Look = Mapping[str, Any]  # a line's colour and dashes
TAIL = 0.35  # the share of the tokens that the second panel of the loss curves shows


def _look(document: Document) -> dict[str, dict[str, Any]]:
    """Return each contestant's colour and dashes, by its place in the document, whoever else is shown."""
    return {
        one["name"]: {
            "color": PALETTE[place % len(PALETTE)],
            "linestyle": DASHES[place // len(PALETTE) % len(DASHES)],
        }
        for place, one in enumerate(document["contestants"])
    }


def draw_loss(figure: Any, document: Document, shown: Sequence[Contestant]) -> None:
    """Draw held-out loss against tokens: the whole on the left, the end, where they differ, on the right."""
    whole, tail = figure.subplots(1, 2, width_ratios=(2, 3))
    looks, ends = _look(document), []
    for one in shown:
        tokens, low, middle, high = over_seeds(one["curves"])
        for axes in (whole, tail):
            axes.plot(tokens, middle, linewidth=1.6, **looks[one["name"]])
            axes.fill_between(tokens, low, high, color=looks[one["name"]]["color"], alpha=0.12, linewidth=0)
        ends.append((tokens, middle, one))
    last = max(tokens[-1] for tokens, _, _ in ends) or 1.0
    # Where all had the same seconds some end earlier than others, and their ends are what is compared.
    start = min([(1 - TAIL) * last, *(0.98 * t[-1] for t, _, one in ends if not has_diverged(one))])
    late = [y for tokens, middle, _ in ends for x, y in zip(tokens, middle, strict=True) if x >= start]
    compared = [middle[-1] for _, middle, one in ends if not has_diverged(one)]
    tail.set(xlim=(start, last), ylim=_limits(late or compared, compared or late))
    _mark_target(tail, document)
    names = [f"{o['name']}  {'diverged' if has_diverged(o) else f'{y[-1]:.3f}'}" for _, y, o in ends]
    # One that diverged before has no line here to lead to.
    spots = [(t[-1] if t[-1] >= start else last, y[-1], looks[one["name"]]) for t, y, one in ends]
    _label_ends(tail, list(zip(names, spots, strict=True)))
    whole.set_title("the whole run", loc="left", fontsize=9)
    tail.set_title("its end", loc="left", fontsize=9)
    whole.set_ylabel("held-out loss, nats a token")
    for axes in (whole, tail):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(4))
        axes.xaxis.set_major_formatter(_ticker().EngFormatter(sep=""))
        axes.grid(color=FAINT, linewidth=0.6)
    _title(figure, document, "held-out loss against tokens")


def _limits(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """Return an axis's limits for some losses that end somewhere, which one that diverged cannot stretch."""
    if not values:  # all of them diverged before the part that is shown
        return 0.0, 1.0
    low = min(values)
    usual = sorted(ends)[3 * len(ends) // 4]  # three in four end no higher
    high = max(value for value in values if value <= max(usual + 2 * (usual - low), low))
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def over_seeds(curves: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, ...], ...]:
    """Return tokens and the lowest, middle and highest held-out loss of the seeds that got so far.

    Seeds are matched by the evaluation, since the tokens before it differ by a few between them. Where the
    middle seed has diverged there is no point; without a point the tuple is empty.
    """
    every = zip_longest(*(zip(curve["eval_tokens"], curve["eval"], strict=True) for curve in curves))
    found = []
    for points in every:
        there = [point for point in points if point is not None and point[1] is not None]
        lost = sum(
            curve["loss"] is None and (point is None or point[1] is None)
            for curve, point in zip(curves, points, strict=True)
        )
        losses = [loss for _, loss in there]
        middle = statistics.median([*losses, *[math.inf] * lost]) if there else math.inf
        if math.isfinite(middle):
            tokens = statistics.median(tokens for tokens, _ in there)
            found.append((tokens, min(losses), middle, max(losses)))
    return tuple(zip(*found, strict=True))


def _mark_target(axes: Any, document: Document) -> None:
    target = document["protocol"].get("target_loss")
    if target is not None and axes.get_ylim()[0] < target < axes.get_ylim()[1]:
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            f"target {target:.4g}",
            (0.99, target),
            (0, 2),
            xycoords=("axes fraction", "data"),
            ha="right",
            textcoords="offset points",
            fontsize=8,
        )


def _label_ends(axes: Any, ends: Sequence[tuple[str, tuple[float, float, Look]]]) -> None:
    """Name the lines at their right ends, pushed apart to where they can be read."""
    low, high = axes.get_ylim()
    shown = [max(low, min(end, high)) for _, (_, end, _) in ends]
    places = spread_out(shown, (high - low) / 24, low, high)
    for (name, (tokens, _, look)), at, place in zip(ends, shown, places, strict=True):
        axes.plot(tokens, at, "o", color=look["color"], markersize=3.5, clip_on=False)
        axes.annotate(
            name,
            (tokens, at),
            (1.05, (place - low) / (high - low)),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.7,  # thinner than the line, which it is not
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
                **look,
            },
        )


def draw_memory_loss(figure: Any, document: Document, shown: Sequence[Contestant]) -> None:
    """Draw the final loss against the peak of memory, with the front of those nobody beats in both."""
    # The process holds much that is no contestant's doing, but a few cannot be looked into.
    known = sum(one["tensor_bytes"] is not None for one in shown)
    field = "tensor_bytes" if 3 * known >= 2 * len(shown) else "peak_bytes"
    unknown = [one["name"] for one in shown if one[field] is None]
    shown = [one for one in shown if one[field] is not None]
    unit, looks, axes = byte_unit(one[field] for one in shown), _look(document), figure.subplots()
    points = [(in_unit(one[field], unit), median(one, "loss", math.nan)) for one in shown]
    edges = [one["loss"][edge] for one in shown for edge in ("lowest", "median", "highest")]
    limits = _limits(edges, [y for _, y in points])
    best = front(points)
    corners = (*best, (max(x for x, _ in points), best[-1][1]))
    axes.step(*zip(*corners, strict=True), where="post", color="#999999", linewidth=1, zorder=1)
    for one, (x, y) in zip(shown, points, strict=True):
        colour = looks[one["name"]]["color"]
        if y <= limits[1]:
            _point(axes, one, (x, y), colour, filled=(x, y) in best)
        else:
            axes.plot(x, limits[1], "^", color=colour, markersize=8, clip_on=False)
    axes.margins(x=0.14)
    axes.set_ylim(limits)
    what = "all tensors" if field == "tensor_bytes" else "the whole process"
    without = f"; not known of {', '.join(unknown)}" if unknown else ""
    axes.set(
        xlabel=f"peak memory of {what}, {unit}{without}", ylabel="held-out loss at the end, nats a token"
    )
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    _title(figure, document, "loss against peak memory; filled: nobody is lower in both (Pareto front)")
    _point_legend(axes, shown)
    _label_points(axes, shown, points, corners, looks)


def _point(axes: Any, one: Contestant, at: tuple[float, float], colour: str, *, filled: bool) -> None:
    whisker = [[at[1] - one["loss"]["lowest"]], [one["loss"]["highest"] - at[1]]]
    axes.errorbar(
        *at,
        yerr=whisker,
        color=colour,
        marker=MARKERS[one["kind"]],
        markersize=7,
        markerfacecolor=colour if filled else "white",
        capsize=2,
        linewidth=1,
        zorder=3,
    )


def _point_legend(axes: Any, shown: Sequence[Contestant]) -> None:
    """Say which shape is whose, where there are both."""
    kinds = [kind for kind in MARKERS if any(one["kind"] == kind for one in shown)]
    if len(kinds) > 1:
        for kind in kinds:
            axes.plot([], [], MARKERS[kind], color=INK, markerfacecolor="white", label=WHOSE[kind])
        axes.legend(loc="upper right", frameon=False, fontsize=8)


def _label_points(
    axes: Any,
    shown: Sequence[Contestant],
    points: Sequence[tuple[float, float]],
    corners: Sequence[tuple[float, float]],
    looks: Mapping[str, Look],
) -> None:
    """Name the points, each where its name hides the least of what is there already."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that data have a place in pixels
    pixel, high = figure.dpi / 72, axes.get_ylim()[1]
    spots = [axes.transData.transform((x, min(y, high))) for x, y in points]
    names = [
        one["name"] if y <= high else f"{one['name']}  {y:.3g}"
        for one, (_, y) in zip(shown, points, strict=True)
    ]
    boxes = place_names(
        spots,
        [(4.9 * len(name) * pixel, 10 * pixel) for name in names],
        around=[axes.transData.transform(corner) for corner in corners],
        inside=axes.get_window_extent().extents,
        reaches=[reach * pixel for reach in (9, 18, 30, 45)],
    )
    for one, name, (x, y), spot, box in zip(shown, names, points, spots, boxes, strict=True):
        middle = ((box[0] + box[2]) / 2 - spot[0], (box[1] + box[3]) / 2 - spot[1])
        colour = looks[one["name"]]["color"]
        axes.annotate(
            name,
            (x, min(y, high)),
            (middle[0] / pixel, middle[1] / pixel),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4},
        )


def draw_memory(figure: Any, document: Document, shown: Sequence[Contestant]) -> None:
    """Draw what each holds at its peak, by term; what every process holds before is written, not drawn."""
    terms = [one["memory"]["terms"] for one in shown]
    totals = [sum(found.values()) - found.get("fixed", 0) for found in terms]
    order = sorted(range(len(shown)), key=lambda n: -totals[n])
    unit, axes = byte_unit(totals), figure.subplots()
    places, left = range(len(order)), [0.0] * len(order)
    for term in TERMS:
        widths = [in_unit(terms[n].get(term, 0), unit) for n in order]
        if term == "fixed" or not any(widths):
            continue
        axes.barh(
            places, widths, left=left, color=COLOURS[term], hatch=HATCHES[term], edgecolor="white", label=term
        )
        left = [before + width for before, width in zip(left, widths, strict=True)]
    moments = {found["moment"] for found in (one["memory"] for one in shown)}
    for place, n in enumerate(order):
        fixed = terms[n].get("fixed", 0)
        rest = f"  + {amount(fixed, unit)} fixed" if fixed else ""
        axes.text(left[place], place, f"  {amount(totals[n], unit)}{rest}", va="center", fontsize=8)
    axes.set_yticks(places, [_at(shown[n], moments) for n in order], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    when = f"the peak ({moments.pop()})" if len(moments) == 1 else "the peak"
    axes.set_xlabel(f"{unit} at {when}, measured; fixed is what the process holds before")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(TERMS), frameon=False, fontsize=8)
    _title(figure, document, "memory at the peak by term")


def _at(one: Contestant, moments: Collection[str]) -> str:
    """Return a contestant's name, with the moment of its peak where they differ."""
    return str(one["name"]) if len(moments) == 1 else f"{one['name']}\nat {one['memory']['moment']}"


def draw_speed(figure: Any, document: Document, shown: Sequence[Contestant]) -> None:
    """Draw tokens/s, the fastest first, with whiskers from the slowest turn to the fastest."""
    found = sorted(shown, key=lambda one: -median(one, "tokens_per_s", 0))
    middles = [median(one, "tokens_per_s", 0) for one in found]
    off = [
        [middle - one["tokens_per_s"]["lowest"] for middle, one in zip(middles, found, strict=True)],
        [one["tokens_per_s"]["highest"] - middle for middle, one in zip(middles, found, strict=True)],
    ]
    axes, places = figure.subplots(), range(len(found))
    colours = [BARS[one["kind"]] for one in found]
    axes.barh(
        places, middles, color=colours, xerr=off, error_kw={"capsize": 3, "elinewidth": 1.2, "ecolor": INK}
    )
    for place, one in zip(places, found, strict=True):
        ratio = median(one, "speed_ratio", math.nan)
        text = "" if math.isnan(ratio) else f"   {ratio:.2f} x {document['protocol']['reference']}"
        axes.text(one["tokens_per_s"]["highest"], place, text, va="center", fontsize=8)
    axes.set_yticks(places, [one["name"] for one in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(one["tokens_per_s"]["highest"] for one in found))
    axes.xaxis.set_major_formatter(_ticker().EngFormatter(sep=""))
    axes.set_xlabel("tokens/s: median of the turns, whiskers from the slowest to the fastest")
    handles = [axes.barh(0, 0, color=BARS[kind], label=WHOSE[kind]) for kind in BARS]
    if len({one["kind"] for one in found}) > 1:
        axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=8)
    _title(figure, document, "tokens per second")


def _title(figure: Any, document: Document, what: str) -> None:
    figure.suptitle(f"{document['title']}\n{what}", x=0.01, ha="left", fontsize=10)


def _ticker() -> Any:
    return extras.load("matplotlib.ticker", extra="plots", purpose="a suite's pictures")
