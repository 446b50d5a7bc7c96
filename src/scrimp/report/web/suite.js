// The charts of a suite. Which methods are picked is one set, changed by the legend and by the table's boxes.

function suiteReport(suite) {
  const all = suite.contestants.map((row, style) => ({ ...row, style }));
  const measured = all.filter((row) => row.status !== "missing" && row.status !== "failed");
  const reference = suite.protocol?.reference;
  // Twelve lines can be told apart; a larger suite starts with its first twelve.
  const picked = new Set(measured.slice(0, 12).map((row) => row.name));
  const charts = [];
  const chosen = () => measured.filter((row) => picked.has(row.name));
  const redraw = () => charts.forEach((draw) => draw());
  const add = (parent, spec) => charts.push(figure(parent, spec));

  const table = document.querySelector("#contestants table");
  sortable(table);
  filterable(table, "Filter contestants");
  const boxes = pickers(all, measured, picked, table, redraw);

  const section = document.getElementById("charts");
  section.append(boxes);
  const grid = h("div", { class: "charts" });
  section.append(grid);
  const tipOf = (row, rows) => ({ title: row.name, swatch: swatch(row.style), rows });

  if (measured.some((row) => row.curves?.length)) lossChart(grid, add, redraw, chosen, tipOf, suite.protocol);
  if (measured.some((row) => row.loss)) frontChart(grid, add, redraw, chosen, tipOf);
  if (measured.some((row) => row.trials?.length)) searchChart(grid, add, redraw, chosen, tipOf);
  if (measured.some((row) => row.memory)) memoryChart(grid, add, redraw, chosen);
  if (measured.some((row) => row.tokens_per_s)) speedCharts(grid, add, chosen, tipOf, reference);
}

/** The legend, and a box in each row of the table; both say and set what is picked. */
function pickers(all, measured, picked, table, redraw) {
  const inputs = new Map();
  const set = (names, on) => {
    for (const name of names) {
      if (on) picked.add(name);
      else picked.delete(name);
      for (const input of inputs.get(name)) input.checked = on;
      table.querySelector(`tr[data-name="${CSS.escape(name)}"]`).classList.toggle("unpicked", !on);
    }
    redraw();
  };
  const input = (row, label) => {
    const made = h("input", { type: "checkbox", checked: picked.has(row.name), "aria-label": label,
      on: { change: (event) => set([row.name], event.target.checked) } });
    inputs.set(row.name, [...(inputs.get(row.name) ?? []), made]);
    return made;
  };
  for (const row of measured) {
    const line = table.querySelector(`tr[data-name="${CSS.escape(row.name)}"]`);
    line.classList.toggle("unpicked", !picked.has(row.name));
    line.cells[0].prepend(h("span", { class: "pick" }, input(row, `show ${row.name} in the charts`), swatch(row.style)));
  }
  const names = measured.map((row) => row.name);
  const light = (name) => () => document.querySelectorAll(".box .series").forEach((series) => {
    series.classList.toggle("dim", name !== null && series.dataset.name !== name);
  });
  return h("div", { class: "legend", role: "group", "aria-label": "Methods in the charts" },
    h("div", { class: "chips" },
      ...measured.map((row) => h("label", { class: "chip", on: { pointerenter: light(row.name), pointerleave: light(null) } },
        input(row, row.name), swatch(row.style), row.name))),
    h("div", { class: "ends" },
      h("button", { type: "button", on: { click: () => set(names, true) } }, "all"),
      h("button", { type: "button", on: { click: () => set(names, false) } }, "none")));
}

/**
 * Where a close-up ends: a few times as far above the best as three quarters of the others lie. One method that
 * did not learn would else press all others into a line.
 */
function ceilingOf(losses, times = 5) {
  const sorted = losses.filter(isNumber).sort((a, b) => a - b);
  if (sorted.length < 3) return undefined;
  const quarter = sorted[Math.floor((sorted.length - 1) * 0.75)];
  return quarter > sorted[0] ? sorted[0] + times * (quarter - sorted[0]) : undefined;
}

/** Leave out the tokens before the first line comes below the ceiling, but for one point that leads into view. */
function fromTheCeiling(layers, ceiling) {
  const starts = layers.map(({ points }) => points.findIndex((point) => isNumber(point.y) && point.y <= ceiling))
    .map((index, layer) => (index < 0 ? Infinity : layers[layer].points[Math.max(0, index - 1)].x));
  const start = Math.min(...starts);
  for (const layer of layers) layer.points = layer.points.filter((point) => point.x >= start);
}

function lossChart(grid, add, redraw, chosen, tipOf, protocol) {
  const now = { what: "eval", log: false, close: true };
  const change = (name) => (value) => {
    now[name] = value;
    redraw();
  };
  /** The seed whose last held-out loss is the median: a run that was, not an average that was not. */
  const middle = (row) => {
    const ended = row.curves.map((curve) => ({ curve, end: curve.eval?.findLast(isNumber) ?? Infinity }));
    ended.sort((a, b) => a.end - b.end);
    return ended[Math.floor((ended.length - 1) / 2)]?.curve;
  };
  const layersOf = (row) => {
    const bold = middle(row);
    return [...(row.curves ?? [])].sort((a, b) => (a === bold) - (b === bold)).map((curve) => {
      const xs = (now.what === "eval" ? curve.eval_tokens : curve.tokens) ?? [];
      const ys = (now.what === "eval" ? curve.eval : curve.train) ?? [];
      const points = xs.map((x, index) => ({ x, y: ys[index] }));
      for (const point of points) {
        if (!isNumber(point.y)) continue;
        point.tip = tipOf(row, [["tokens", whole(point.x)],
          [now.what === "eval" ? "held-out loss" : "training loss", loss(point.y)], ["seed", curve.seed], ["lr", digits(curve.lr, 3)]]);
      }
      return { key: `${row.name} ${curve.seed}`, name: row.name, style: row.style, kind: "line", points, faint: curve !== bold, bold: curve === bold };
    });
  };
  const draw = (width) => {
    const rows = chosen().filter((row) => row.curves?.length);
    const ceiling = now.close ? ceilingOf(rows.map((row) => row.loss?.median)) : undefined;
    const layers = rows.flatMap(layersOf).sort((a, b) => b.faint - a.faint);
    if (ceiling) fromTheCeiling(layers, ceiling);
    if (isNumber(protocol?.target_loss) && layers.length) {
      layers.push({ name: "", kind: "rule", rule: "budget", text: `target ${digits(protocol.target_loss)}`, points: [{ y: protocol.target_loss }] });
    }
    const what = now.what === "eval" ? "held-out loss" : "training loss";
    return xyChart({ label: `${what} against tokens`, height: width < 500 ? 320 : 420, layers,
      x: { title: "training tokens", log: now.log, short: (v) => counts(v, 3) },
      y: { title: `${what}, nats a token`, ceiling, short: (v) => digits(v, 4) } }, width);
  };
  add(grid, { id: "chart-loss", title: "Loss against tokens", wide: true, draw,
    about: "Bold: the run of the median seed; faint: the other seeds. The close-up cuts what lies far above most.",
    controls: [choice("Loss", [["eval", "held-out"], ["train", "training"]], "eval", change("what")),
      toggle("log tokens", false, change("log")), toggle("close-up", true, change("close"))] });
}

/** Those that no other beats in both memory and loss, from the least memory. */
function paretoFront(points) {
  let best = Infinity;
  return [...points].sort((a, b) => a.x - b.x || a.y - b.y).filter((point) => {
    if (point.y >= best) return false;
    best = point.y;
    return true;
  });
}

function frontChart(grid, add, redraw, chosen, tipOf) {
  const axes = [["tensor_bytes", "tensors", "peak of live tensors"], ["peak_bytes", "resident", "peak resident memory of the process"],
    ["state_bytes", "state", "optimizer state"]].filter(([key]) => chosen().some((row) => isNumber(row[key])));
  if (!axes.length) return;
  let [key] = axes[0];
  let close = true;
  const draw = (width) => {
    const title = axes.find(([name]) => name === key)[2];
    const rows = chosen().filter((row) => isNumber(row[key]) && isNumber(row.loss?.median));
    const layers = rows.map((row) => ({ key: "points", name: row.name, style: row.style, kind: "points", size: 5.5, points: [{
      x: row[key], y: row.loss.median, low: row.loss.lowest, high: row.loss.highest, text: row.name,
      tip: tipOf(row, [[title, bytes(row[key])], ["held-out loss", spreadText(row.loss, loss)]]) }] }));
    const best = paretoFront(layers.map((layer) => layer.points[0]));
    const front = best.map(({ x, y }) => ({ x, y }));
    // From the left, for the arrow keys; those on the front get their labels first.
    layers.sort((a, b) => a.points[0].x - b.points[0].x);
    for (const { points: [point] } of layers) point.first = best.includes(point);
    if (front.length) layers.unshift({ key: "front", name: "", kind: "front", points: front });
    return xyChart({ label: `held-out loss against ${title}`, height: 360, layers,
      x: { title, unit: "bytes", room: 0.08, short: (v) => bytes(v, 4) },
      y: { title: "held-out loss, nats a token", short: (v) => digits(v, 4),
        room: 0.12, ceiling: close ? ceilingOf(rows.map((row) => row.loss.median)) : undefined } }, width);
  };
  add(grid, { id: "chart-front", title: "Loss against memory", draw,
    about: "Lower and further left is better; the line joins those that no other beats in both (Pareto front). Whiskers: lowest to highest seed.",
    controls: [choice("Memory", axes.map(([name, text]) => [name, text]), key, (value) => {
      key = value;
      redraw();
    }), toggle("close-up", true, (value) => {
      close = value;
      redraw();
    })] });
}

function searchChart(grid, add, redraw, chosen, tipOf) {
  let close = true;
  const draw = (width) => {
    const rows = chosen().filter((row) => row.trials?.length);
    const layers = rows.map((row) => ({ key: row.name, name: row.name, style: row.style, kind: "both", points: [...row.trials]
      .sort((a, b) => a.lr - b.lr || a.seed - b.seed)
      .map((trial) => ({ x: trial.lr, y: trial.loss, lost: !isNumber(trial.loss), chosen: trial.lr === row.lr,
        tip: tipOf(row, [["lr", digits(trial.lr, 3)], ["held-out loss", isNumber(trial.loss) ? loss(trial.loss) : "diverged"],
          ["seed", trial.seed], ["", trial.lr === row.lr ? "chosen" : null]]) })) }));
    return xyChart({ label: "held-out loss against learning rate", height: 360, layers,
      x: { title: "learning rate", log: true, room: 0.06, short: (v) => digits(v, 3),
        at: [...new Set(rows.flatMap((row) => row.trials.map((trial) => trial.lr)))] },
      y: { title: "held-out loss, nats a token", short: (v) => digits(v, 4),
        ceiling: close ? ceilingOf(rows.flatMap((row) => row.trials.map((trial) => trial.loss)), 2) : undefined } }, width);
  };
  add(grid, { id: "chart-search", title: "Learning-rate search", draw,
    about: "Every trial of the search; a ring marks the rate that was chosen, a cross at the top a trial that diverged, an arrow one beyond the close-up.",
    controls: [toggle("close-up", true, (value) => {
      close = value;
      redraw();
    })] });
}

function memoryChart(grid, add, redraw, chosen) {
  let fixed = !chosen().some((row) => row.memory && fixedShare(row.memory) > 0.5);
  const draw = (width) => {
    const terms = TERMS.filter((term) => fixed || term !== "fixed");
    const rows = chosen().filter((row) => row.memory).map((row) => {
      const parts = partsOf(row.memory.terms, terms, row.memory.moment).map((part) => ({ ...part, tip: part.tip(row.name) }));
      const sum = parts.reduce((total, part) => total + part.value, 0);
      for (const part of parts) {
        part.tip.rows.push(["in all", bytes(sum)], ["planned", fixed && isNumber(row.predicted_bytes) ? bytes(row.predicted_bytes) : null]);
      }
      return { name: row.name, parts, end: bytes(sum, 3), mark: fixed ? { value: row.predicted_bytes } : null };
    });
    return barChart({ label: "memory at the peak by term", rows, axis: { unit: "bytes", short: (v) => bytes(v, 3) } }, width);
  };
  const key = termLegend(TERMS.filter((name) => chosen().some((row) => row.memory?.terms[name] > 0)),
    chosen().some((row) => isNumber(row.predicted_bytes)) ? planKey() : null);
  key.classList.toggle("unfixed", !fixed);
  add(grid, { id: "chart-memory", title: "Memory by term", wide: true, draw,
    about: "Measured at the moment of the peak. The terms and their fills are those of the plan.",
    controls: [key,
      toggle("with what is fixed", fixed, (value) => {
        fixed = value;
        key.classList.toggle("unfixed", !fixed);
        redraw();
      })] });
}

function speedCharts(grid, add, chosen, tipOf, reference) {
  const bars = (key, write, title) => (width) => {
    const rows = chosen().filter((row) => isNumber(row[key]?.median)).map((row) => ({
      name: row.name, style: row.style, end: write(row[key].median), whisker: isNumber(row[key].lowest) ? [row[key].lowest, row[key].highest] : null,
      parts: [{ value: row[key].median, tip: tipOf(row, [[title, write(row[key].median)],
        ["lowest", isNumber(row[key].lowest) ? write(row[key].lowest) : null], ["highest", isNumber(row[key].highest) ? write(row[key].highest) : null],
        ["pairs", row[key].all?.length > 1 ? row[key].all.length : null]]) }] }));
    return barChart({ label: title, rows, one: key === "speed_ratio" ? 1 : null,
      axis: { short: (v) => (key === "speed_ratio" ? digits(v, 3) : counts(v, 3)) } }, width);
  };
  add(grid, { id: "chart-speed", title: "Tokens per second", draw: bars("tokens_per_s", whole, "tokens/s"),
    about: "Median; whiskers from the lowest to the highest." });
  if (!chosen().some((row) => row.speed_ratio)) return;
  add(grid, { id: "chart-ratio", title: `Speed, as a multiple of ${reference}`,
    draw: bars("speed_ratio", (v) => `${v.toFixed(3)} ×`, `speed to ${reference}`),
    about: "Within interleaved pairs, which a noisy machine slows alike. Above 1 is faster." });
}
