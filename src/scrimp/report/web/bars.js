// Horizontal bars: a row each, with a name, parts side by side, a whisker, a mark and a text at the end.
//
//   {label, axis: {title, unit, write, short, log}, rows: [row], one}        one: draw a line at this value
//   row  {name, text, style, parts: [{value, term, tip}], whisker: [low, high], end, mark: {value}, last}
//
// After a `last` row there is a gap.

const ROW = 30,
  BAR = 18,
  GAP = 10;

const partClass = (row, part) =>
  part.term ? `part term-${part.term.replaceAll(" ", "-")}` : `part ${styleOf(row.style)}`;

/** Where the names stand: beside the bars, or above them where the page is narrow. */
function barLayout(rows, width) {
  const longest = Math.max(...rows.map((row) => textWidth(row.text ?? row.name)));
  const beside = width >= 480;
  const left = beside ? Math.min(Math.ceil(longest) + 12, Math.floor(width * 0.34)) : 0;
  const ends = Math.ceil(Math.max(...rows.map((row) => textWidth(row.end ?? "")))) + 12;
  return { left, right: width - ends, beside, pitch: beside ? ROW : ROW + 14 };
}

function barChart(spec, width) {
  const { rows } = spec;
  if (!rows.length) return empty(spec.empty ?? "Nothing of what is picked was measured.");
  const { left, right, beside, pitch } = barLayout(rows, width);
  const top = 30,
    bottom = top + pitch * rows.length + GAP * rows.filter((row) => row.last).length + 2;
  const total = (row) => row.parts.reduce((sum, part) => sum + part.value, 0);
  const values = rows.flatMap((row) => [
    total(row),
    ...(row.whisker ?? []),
    row.mark?.value ?? 0,
    spec.one ?? 0,
  ]);
  const domain = [0, (Math.max(...values) || 1) * 1.02];
  const sample = textWidth(spec.axis.short(domain[1])) + 26;
  const x = scale({
    domain,
    range: [left, right],
    unit: spec.axis.unit,
    most: Math.max(2, Math.floor((right - left) / sample)),
  });
  const svg = canvas(spec.label, width, bottom + 6);
  svg.append(barAxis(spec, x, { top, bottom, width }));
  if (isNumber(spec.one)) {
    svg.append(s("path", { class: "rule one", d: `M${x.at(spec.one).toFixed(1)} ${top}V${bottom}` }));
  }
  const targets = [];
  let place = top;
  for (const row of rows) {
    svg.append(drawRow(row, x, place + (beside ? (ROW - BAR) / 2 : 18), { beside, left, width }, targets));
    place += pitch + (row.last ? GAP : 0);
  }
  answer(svg, targets);
  return svg;
}

function barAxis(spec, x, { top, bottom, width }) {
  const group = s("g", { class: "axes", "aria-hidden": "true" });
  for (const tick of x.ticks) {
    const at = x.at(tick),
      half = textWidth(spec.axis.short(tick)) / 2;
    const anchor = at - half < 0 ? "start" : at + half > width ? "end" : "middle";
    group.append(
      s("path", { class: "grid", d: `M${at.toFixed(1)} ${top - 4}V${bottom}` }),
      s(
        "text",
        { class: "tick", x: at.toFixed(1), y: top - 10, "text-anchor": anchor },
        spec.axis.short(tick),
      ),
    );
  }
  return group;
}

function drawRow(row, x, y, { beside, left, width }, targets) {
  const group = s("g", { class: "series row", "data-name": row.name });
  const middle = y + BAR / 2;
  const room = beside ? left - 10 : width;
  group.append(
    s(
      "text",
      { class: "name", x: 0, y: beside ? middle : y - 6, dy: beside ? "0.35em" : 0 },
      cut(row.text ?? row.name, room),
    ),
  );
  let from = 0;
  for (const part of row.parts) {
    const [start, end] = [x.at(from), x.at(from + part.value)];
    from += part.value;
    const box = { x: start, y, width: Math.max(0, end - start), height: BAR };
    group.append(
      s("rect", {
        class: partClass(row, part),
        "data-term": part.term,
        x: start.toFixed(1),
        y,
        width: box.width.toFixed(1),
        height: BAR,
      }),
    );
    if (part.tip)
      targets.push({ x: (start + end) / 2, y: middle, box, key: row.key ?? row.name, tip: part.tip });
  }
  let last = x.at(from);
  if (row.whisker) {
    const [low, high] = row.whisker.map((value) => x.at(value));
    last = Math.max(last, high);
    group.append(
      s("path", {
        class: "whisker ink",
        d: `M${low} ${middle - 5}v10M${high} ${middle - 5}v10M${low} ${middle}H${high}`,
      }),
    );
  }
  if (row.mark && isNumber(row.mark.value)) {
    const at = x.at(row.mark.value);
    last = Math.max(last, at + 2);
    group.append(s("path", { class: "plan", d: `M${at.toFixed(1)} ${y - 4}v${BAR + 8}` }));
  }
  if (row.end)
    group.append(s("text", { class: "end", x: (last + 7).toFixed(1), y: middle, dy: "0.35em" }, row.end));
  return group;
}

/** The parts of a bar of memory; `tip` is still to be told its title. */
const partsOf = (sizes, terms, moment) =>
  terms
    .filter((term) => sizes[term] > 0)
    .map((term) => ({
      term,
      value: sizes[term],
      tip: (title) => ({
        title,
        rows: [
          [term, bytes(sizes[term])],
          ["moment", moment],
        ],
      }),
    }));

/** Where most of a process is the program itself, what the methods change would be a sliver: it starts left out. */
const fixedShare = ({ terms }) =>
  (terms.fixed ?? 0) / Object.values(terms).reduce((sum, size) => sum + size, 0);

/** The legend of the memory terms, in the fills of the plan. */
function termLegend(terms, extra = null) {
  return h(
    "div",
    { class: "terms" },
    ...terms.map((term) =>
      h(
        "span",
        { class: term === "fixed" ? "of-fixed" : null },
        s(
          "svg",
          { width: 18, height: 12, "aria-hidden": "true" },
          s("rect", { class: `part term-${term.replaceAll(" ", "-")}`, width: 18, height: 12 }),
        ),
        term,
      ),
    ),
    extra,
  );
}

// Planned is the whole process: beside bars without what is fixed it would mean nothing.
const planKey = () =>
  h(
    "span",
    { class: "of-fixed" },
    s("svg", { width: 10, height: 16, "aria-hidden": "true" }, s("path", { class: "plan", d: "M5 0V16" })),
    "planned",
  );
