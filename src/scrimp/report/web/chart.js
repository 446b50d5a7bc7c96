// Charts of two axes. A chart is described by plain data and drawn at the width that its box has, so that its
// text keeps its size; a change of width draws it anew.
//
//   {label, height, x: axis, y: axis, layers: [layer]}
//   axis   {title, log, zero, unit, short, ceiling, at}   short writes a tick; a line is cut at the ceiling, a point
//                                                        above it stands there as an arrow; at holds the ticks
//   layer  {key, name, style, kind, points: [{x, y, low, high, tip, text, chosen, lost}], faint, bold, rule}
//   kind   "line", "points", "both", "front" (steps), "rule" (a level across; its text, what writes its value, whose)

const COLOURS = 6,
  MARKERS = 6;
let serial = 0; // makes names of groups and clips unique

/** Classes of a series: six colours, then the same dashed and hollow, then dotted. */
const styleOf = (index) => `c${index % COLOURS} d${Math.floor(index / COLOURS) % 3}`;

const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.2 * r} ${0.9 * r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z`,
  (r) => `M0 ${1.3 * r}L${1.2 * r} ${-0.9 * r}H${-1.2 * r}z`,
  (r) =>
    `M${-1.3 * r} ${-0.5 * r}H${-0.5 * r}V${-1.3 * r}H${0.5 * r}V${-0.5 * r}H${1.3 * r}V${0.5 * r}H${0.5 * r}V${1.3 * r}H${-0.5 * r}V${0.5 * r}H${-1.3 * r}z`,
];

const marker = (index, x, y, radius = 4.5, extra = "") =>
  s("path", {
    class: `marker ${styleOf(index)} ${extra}`,
    d: SHAPES[index % MARKERS](radius),
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
  });

const swatch = (index) =>
  s(
    "svg",
    { class: "swatch", width: 30, height: 14, "aria-hidden": "true", focusable: "false" },
    s("path", { class: `line ${styleOf(index)}`, d: "M1 7H29" }),
    marker(index, 15, 7, 4),
  );

/** Draw `describe(width)` into `box`, and again when its width changes. Returns the function that redraws. */
function drawn(box, draw) {
  let width = 0;
  const redraw = () => {
    if (!width) return;
    hideTip();
    const hadFocus = box.contains(document.activeElement);
    box.replaceChildren(...[draw(width)].flat());
    if (hadFocus) box.querySelector("svg[tabindex]")?.focus({ preventScroll: true });
  };
  new ResizeObserver(([entry]) => {
    const found = Math.floor(entry.contentRect.width);
    if (found === width) return;
    width = found;
    // Outside the observer's turn: a drawing that changes the page's height would call it again.
    requestAnimationFrame(redraw);
  }).observe(box);
  return redraw;
}

const canvas = (label, width, height) =>
  s("svg", {
    class: "plot",
    role: "application",
    "aria-roledescription": "chart",
    tabindex: 0,
    width,
    height,
    "aria-label": `${label}. Arrow keys go from value to value.`,
  });

function empty(text) {
  return h("p", { class: "quiet" }, text);
}

/** Draw a chart of two axes. */
function xyChart(spec, width) {
  const points = spec.layers.flatMap((layer) => layer.points);
  const xs = domainOf(
    points.map((point) => point.x),
    { ...spec.x, room: spec.x.room ?? 0.02 },
  );
  const { ceiling = Infinity } = spec.y;
  const ys = domainOf(
    points.flatMap((point) => [point.y, point.low, point.high]).filter((value) => value <= ceiling),
    { ...spec.y, room: spec.y.room ?? 0.06 },
  );
  // No room above a ceiling: what is said to lie above the close-up must not be in it.
  if (ys && ys[1] > ceiling) ys[1] = ceiling;
  if (!xs || !ys) return empty(spec.empty ?? "Nothing of what is picked was measured.");
  const height = spec.height ?? 320;
  const yTicks = scale({
    domain: ys,
    range: [0, 1],
    most: Math.floor((height - 70) / 44),
    ...kindOf(spec.y),
  });
  const left = Math.ceil(Math.max(...yTicks.ticks.map((tick) => textWidth(spec.y.short(tick))), 20)) + 14;
  const frame = { left, right: width - 14, top: 30, bottom: height - 42 };
  const y = scale({
    ...kindOf(spec.y),
    domain: ys,
    range: [frame.bottom, frame.top],
    most: Math.floor((height - 70) / 44),
  });
  const sample = Math.max(...xs.map((end) => textWidth(spec.x.short(end)))) + 26;
  const x = scale({
    ...kindOf(spec.x),
    domain: xs,
    range: [frame.left, frame.right],
    most: Math.max(3, Math.floor((frame.right - frame.left) / sample)),
  });
  if (spec.x.at) x.ticks = apart(spec.x.at, x, (frame.right - frame.left) / sample) ?? x.ticks;
  const svg = canvas(spec.label, width, height);
  svg.append(axes(spec, x, y, frame, width));
  const clip = `clip-${(serial += 1)}`;
  svg.append(
    s(
      "clipPath",
      { id: clip },
      s("rect", {
        x: frame.left - 2,
        y: frame.top - 2,
        width: frame.right - frame.left + 4,
        height: frame.bottom - frame.top + 4,
      }),
    ),
  );
  const targets = [];
  const labels = [];
  const place = { x, y, frame, clip };
  for (const layer of spec.layers) {
    if (layer.kind !== "rule") svg.append(drawLayer(layer, place, targets, labels));
  }
  svg.append(...drawRules(spec.layers, place));
  svg.append(placeLabels(labels, frame, targets));
  answer(svg, targets);
  return svg;
}

/** The ticks asked for, if there is room for them all. */
function apart(ticks, x, most) {
  const places = ticks.map(x.at).sort((a, b) => a - b);
  const least = (x.at(x.domain[1]) - x.at(x.domain[0])) / Math.max(1, most);
  return places.every((place, index) => !index || place - places[index - 1] >= least * 0.8) ? ticks : null;
}

const kindOf = ({ log, unit }) => ({ log, unit });

function axes(spec, x, y, frame, width) {
  const group = s("g", { class: "axes", "aria-hidden": "true" });
  group.append(s("text", { class: "title", x: 0, y: 13 }, cut(spec.y.title, width)));
  for (const tick of y.ticks) {
    const at = y.at(tick).toFixed(1);
    group.append(
      s("path", { class: "grid", d: `M${frame.left} ${at}H${frame.right}` }),
      s(
        "text",
        { class: "tick", x: frame.left - 8, y: at, dy: "0.35em", "text-anchor": "end" },
        spec.y.short(tick),
      ),
    );
  }
  for (const tick of x.ticks) {
    const at = x.at(tick);
    const half = textWidth(spec.x.short(tick)) / 2;
    // The outermost labels may not leave the picture.
    const anchor = at + half > width ? "end" : "middle";
    group.append(
      s("path", { class: "grid", d: `M${at.toFixed(1)} ${frame.top}V${frame.bottom}` }),
      s(
        "text",
        { class: "tick", x: Math.min(at, width - 1).toFixed(1), y: frame.bottom + 17, "text-anchor": anchor },
        spec.x.short(tick),
      ),
    );
  }
  group.append(
    s("path", { class: "axis", d: `M${frame.left} ${frame.bottom}H${frame.right}` }),
    s(
      "text",
      { class: "title", x: frame.right, y: frame.bottom + 36, "text-anchor": "end" },
      cut(spec.x.title, width),
    ),
  );
  return group;
}

const inside = (point, x, y) =>
  isNumber(point.x) && isNumber(point.y) && (!x.log || point.x > 0) && (!y.log || point.y > 0);

/** A path through the points, broken where a value is missing. */
function pathOf(points, x, y, steps) {
  let path = "",
    pen = "M";
  for (const point of points) {
    if (!inside(point, x, y)) {
      pen = "M";
      continue;
    }
    const at = `${x.at(point.x).toFixed(1)} ${y.at(point.y).toFixed(1)}`;
    // A front is reached by what costs more: level first, then down.
    path += pen === "L" && steps ? `H${x.at(point.x).toFixed(1)}V${y.at(point.y).toFixed(1)}` : pen + at;
    pen = "L";
  }
  return path;
}

function drawLayer(layer, { x, y, frame, clip }, targets, labels) {
  const group = s("g", { class: `series ${layer.faint ? "faint" : ""}`, "data-name": layer.name });
  const style = layer.kind === "front" ? "front" : styleOf(layer.style);
  if (layer.kind !== "points") {
    group.append(
      s("path", {
        class: `line ${style} ${layer.bold ? "bold" : ""} ${layer.dash ?? ""}`,
        "clip-path": `url(#${clip})`,
        d: pathOf(layer.points, x, y, layer.kind === "front"),
      }),
    );
  }
  for (const point of layer.points) {
    const above = point.lost || point.y > y.domain[1];
    const placed = above ? { ...point, y: y.domain[1] } : point;
    if (!inside(placed, x, y)) continue;
    const at = { x: x.at(placed.x), y: y.at(placed.y), above };
    const marked = layer.kind === "points" || layer.kind === "both";
    if (above && !marked) continue;
    if (marked) group.append(dot(layer, point, at, y));
    if (point.text) labels.push({ ...at, text: point.text, first: point.first });
    if (point.tip) targets.push({ x: at.x, y: at.y, key: layer.key, tip: point.tip });
  }
  return group;
}

/** Levels across the chart, with their words above them, or below where there is no room; close ones share theirs. */
function drawRules(layers, { y, frame }) {
  const seen = ({ kind, points: [point] }) =>
    kind === "rule" && point.y <= y.domain[1] && point.y >= y.domain[0];
  const rules = layers.filter(seen).map((layer) => ({ ...layer, at: y.at(layer.points[0].y) }));
  rules.sort((a, b) => a.at - b.at);
  const groups = [];
  for (const rule of rules) {
    if (groups.length && rule.at - groups.at(-1).at(-1).at < 15) groups.at(-1).push(rule);
    else groups.push([rule]);
  }
  return groups.map((group) => {
    const [{ at, rule }] = group;
    const over = at - frame.top >= 18;
    return s(
      "g",
      {},
      ...group.map((one) =>
        s("path", { class: `rule ${one.rule}`, d: `M${frame.left} ${one.at.toFixed(1)}H${frame.right}` }),
      ),
      s(
        "text",
        { class: `tick ${rule}`, x: frame.left + 6, y: (over ? at - 5 : group.at(-1).at + 15).toFixed(1) },
        cut(wordsOf(group), frame.right - frame.left - 12),
      ),
    );
  });
}

/** Name levels that lie too close for a name each: the same words once, with their lowest and highest value. */
function wordsOf(rules) {
  const texts = [...new Set(rules.map((rule) => rule.text))];
  return texts
    .map((text) => {
      const same = rules.filter((rule) => rule.text === text);
      const values = same.map((rule) => rule.points[0].y);
      const ends = [...new Set([Math.min(...values), Math.max(...values)].map(same[0].write))];
      return `${text} ${ends.join(" to ")}${same.length === 1 && same[0].of ? ` (${same[0].of})` : ""}`;
    })
    .join(", ");
}

function dot(layer, point, at, y) {
  const group = s("g", {});
  const style = styleOf(layer.style);
  if (point.lost) {
    group.append(s("path", { class: `lost ${style}`, d: `M${at.x - 4} ${at.y - 4}l8 8m0 -8l-8 8` }));
    return group;
  }
  if (at.above) {
    group.append(s("path", { class: `lost ${style}`, d: `M${at.x} ${at.y + 12}V${at.y}m-4 5l4 -5l4 5` }));
    return group;
  }
  if (isNumber(point.low) && isNumber(point.high) && point.high > point.low) {
    const ends = [point.low, Math.min(point.high, y.domain[1])].map((end) => y.at(end).toFixed(1));
    group.append(
      s("path", {
        class: `whisker ${style}`,
        d: `M${at.x - 4} ${ends[0]}h8M${at.x - 4} ${ends[1]}h8M${at.x} ${ends[0]}V${ends[1]}`,
      }),
    );
  }
  if (point.chosen) group.append(s("circle", { class: `chosen ${style}`, cx: at.x, cy: at.y, r: 9 }));
  group.append(marker(layer.style, at.x, at.y, layer.size ?? 4.5));
  return group;
}

/** Write names beside points where they cover no other name and no point; the tooltip says the rest. */
function placeLabels(labels, frame, targets) {
  const group = s("g", { class: "labels", "aria-hidden": "true" });
  const taken = targets.map(({ x, y }) => ({ x: x - 6, y: y - 6, width: 12, height: 12 }));
  const overlaps = (a) => (b) =>
    a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
  for (const { text, x, y } of labels.sort((a, b) => Boolean(b.first) - Boolean(a.first))) {
    const width = textWidth(text) + 4;
    const places = [
      [x + 8, y - 8],
      [x - width - 8, y - 8],
      [x - width / 2, y - 26],
      [x - width / 2, y + 9],
      [x + 6, y - 24],
      [x + 6, y + 8],
      [x - width - 6, y - 24],
      [x - width - 6, y + 8],
    ];
    const place = places
      .map(([px, py]) => ({ x: px, y: py, width, height: 16 }))
      .find(
        (box) =>
          box.x >= frame.left &&
          box.x + width <= frame.right + 10 &&
          box.y >= frame.top - 8 &&
          box.y + 16 <= frame.bottom &&
          !taken.some(overlaps(box)),
      );
    if (!place) continue;
    taken.push(place);
    group.append(
      s("text", { class: "label", x: (place.x + 2).toFixed(1), y: (place.y + 12).toFixed(1) }, text),
    );
  }
  return group;
}

// ---- around a chart: its figure and its switches ----

/** A group of radio buttons; `change` is told the value picked. */
function choice(legend, options, value, change) {
  const name = `choice-${(serial += 1)}`;
  return h(
    "fieldset",
    { class: "choice" },
    h("legend", {}, legend),
    ...options.map(([key, text]) =>
      h(
        "label",
        {},
        h("input", {
          type: "radio",
          name,
          value: key,
          checked: key === value,
          on: { change: () => change(key) },
        }),
        h("span", {}, text),
      ),
    ),
  );
}

function toggle(text, checked, change) {
  return h(
    "label",
    { class: "toggle" },
    h("input", { type: "checkbox", checked, on: { change: (event) => change(event.target.checked) } }),
    h("span", {}, text),
  );
}

/** A figure with a heading, what it shows, its switches and its chart. Returns the function that redraws. */
function figure(parent, { id, title, about, controls = [], wide = false, draw }) {
  const box = h("div", { class: "box" });
  parent.append(
    h(
      "figure",
      { class: wide ? "chart wide" : "chart", id },
      h("figcaption", {}, h("h3", {}, title), about ? h("p", {}, about) : null),
      controls.length ? h("div", { class: "controls" }, ...controls) : null,
      box,
    ),
  );
  return drawn(box, draw);
}
