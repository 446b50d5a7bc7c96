// The charts of a suite. Which methods are picked is one set, changed by the legend and by the table's boxes.

function suiteReport(suite) {
  const all = suite.contestants.map((row, style) => ({ ...row, style }));
  const measured = all.filter((row) => row.status !== "missing" && row.status !== "failed");
  const reference = suite.protocol?.reference;
  const picked = new Set(firstPicked(measured, reference).map((row) => row.name));
  const charts = [];
  const chosen = () => measured.filter((row) => picked.has(row.name));
  const redraw = () => charts.forEach((draw) => draw());
  const add = (parent, spec) => charts.push(figure(parent, spec));

  const table = document.querySelector("#contestants table");
  sortable(table);
  filterable(table, "Filter contestants");
  const reported = document.querySelector("#reported table");
  if (reported) {
    sortable(reported);
    filterable(reported, "Filter the papers' figures");
  }
  const boxes = pickers(all, measured, picked, table, redraw);

  const section = document.getElementById("charts");
  section.append(boxes);
  const grid = h("div", { class: "charts" });
  section.append(grid);
  const tipOf = (row, rows) => ({ title: row.name, swatch: swatch(row.style), rows });

  // The loss after the few steps of the memory suite says nothing.
  if (suite.suite !== "memory") {
    if (measured.some((row) => row.curves?.length))
      lossChart(grid, add, redraw, chosen, tipOf, suite.protocol);
    if (measured.some((row) => row.loss)) frontChart(grid, add, redraw, chosen, tipOf, measured);
    if (measured.some((row) => row.trials?.length)) searchChart(grid, add, redraw, chosen, tipOf);
  }
  if (measured.some((row) => row.memory)) memoryChart(grid, add, redraw, chosen);
  if (measured.some((row) => row.tokens_per_s)) speedCharts(grid, add, chosen, tipOf, reference);
}

/** Twelve lines can be told apart: a larger suite starts with the twelve of the lowest loss and the reference. */
function firstPicked(rows, reference) {
  const end = (row) => row.loss?.median ?? Infinity;
  const best = [...rows].sort((a, b) => (end(a) < end(b) ? -1 : end(a) > end(b) ? 1 : 0)).slice(0, 12);
  const own = rows.find((row) => row.name === reference);
  return own && !best.includes(own) ? [...best, own] : best;
}

/** The legend, and a box in each row of the table; both say and set what is picked. */
function pickers(all, measured, picked, table, redraw) {
  const inputs = new Map();
  // By its place, before anything is sorted: a name may hold what neither a page nor a selector keeps as it is.
  const lines = new Map(all.map((row, index) => [row.name, table.tBodies[0].rows[index]]));
  const set = (names, on) => {
    for (const name of names) {
      if (on) picked.add(name);
      else picked.delete(name);
      for (const input of inputs.get(name)) input.checked = on;
      lines.get(name).classList.toggle("unpicked", !on);
    }
    redraw();
  };
  const input = (row, label) => {
    const made = h("input", {
      type: "checkbox",
      checked: picked.has(row.name),
      "aria-label": label,
      on: { change: (event) => set([row.name], event.target.checked) },
    });
    inputs.set(row.name, [...(inputs.get(row.name) ?? []), made]);
    return made;
  };
  for (const row of measured) {
    const line = lines.get(row.name);
    line.classList.toggle("unpicked", !picked.has(row.name));
    line.cells[0].prepend(
      h("span", { class: "pick" }, input(row, `show ${row.name} in the charts`), swatch(row.style)),
    );
  }
  const names = measured.map((row) => row.name);
  const light = (name) => () =>
    document.querySelectorAll(".box .series").forEach((series) => {
      series.classList.toggle("dim", name !== null && series.dataset.name !== name);
    });
  return h(
    "div",
    { class: "legend", role: "group", "aria-label": "Methods in the charts" },
    h(
      "div",
      { class: "chips" },
      ...measured.map((row) =>
        h(
          "label",
          { class: "chip", on: { pointerenter: light(row.name), pointerleave: light(null) } },
          input(row, row.name),
          swatch(row.style),
          row.name,
        ),
      ),
    ),
    h(
      "div",
      { class: "ends" },
      h("button", { type: "button", on: { click: () => set(names, true) } }, "all"),
      h("button", { type: "button", on: { click: () => set(names, false) } }, "none"),
    ),
  );
}

function memoryChart(grid, add, redraw, chosen) {
  let fixed = !chosen().some((row) => row.memory && fixedShare(row.memory) > 0.5);
  const draw = (width) => {
    const terms = TERMS.filter((term) => fixed || term !== "fixed");
    const rows = chosen()
      .filter((row) => row.memory)
      .map((row) => {
        const parts = partsOf(row.memory.terms, terms, row.memory.moment).map((part) => ({
          ...part,
          tip: part.tip(row.name),
        }));
        const sum = parts.reduce((total, part) => total + part.value, 0);
        for (const part of parts) {
          part.tip.rows.push(
            ["in all", bytes(sum)],
            ["planned", fixed && isNumber(row.predicted_bytes) ? bytes(row.predicted_bytes) : null],
          );
        }
        return {
          name: row.name,
          parts,
          end: bytes(sum, 3),
          mark: fixed ? { value: row.predicted_bytes } : null,
        };
      });
    return barChart(
      { label: "memory at the peak by term", rows, axis: { unit: "bytes", short: (v) => bytes(v, 3) } },
      width,
    );
  };
  const key = termLegend(
    TERMS.filter((name) => chosen().some((row) => row.memory?.terms[name] > 0)),
    chosen().some((row) => isNumber(row.predicted_bytes)) ? planKey() : null,
  );
  key.classList.toggle("unfixed", !fixed);
  add(grid, {
    id: "chart-memory",
    title: "Memory by term",
    wide: true,
    draw,
    about: "Measured at the moment of the peak. The terms and their fills are those of the plan.",
    controls: [
      key,
      toggle("with what is fixed", fixed, (value) => {
        fixed = value;
        key.classList.toggle("unfixed", !fixed);
        redraw();
      }),
    ],
  });
}

function speedCharts(grid, add, chosen, tipOf, reference) {
  const bars = (key, write, title) => (width) => {
    const rows = chosen()
      .filter((row) => isNumber(row[key]?.median))
      .map((row) => ({
        name: row.name,
        style: row.style,
        end: write(row[key].median),
        whisker: isNumber(row[key].lowest) ? [row[key].lowest, row[key].highest] : null,
        parts: [
          {
            value: row[key].median,
            tip: tipOf(row, [
              [title, write(row[key].median)],
              ["lowest", isNumber(row[key].lowest) ? write(row[key].lowest) : null],
              ["highest", isNumber(row[key].highest) ? write(row[key].highest) : null],
              ["pairs", row[key].all?.length > 1 ? row[key].all.length : null],
            ]),
          },
        ],
      }));
    return barChart(
      {
        label: title,
        rows,
        one: key === "speed_ratio" ? 1 : null,
        axis: { short: (v) => (key === "speed_ratio" ? digits(v, 3) : counts(v, 3)) },
      },
      width,
    );
  };
  add(grid, {
    id: "chart-speed",
    title: "Tokens per second",
    draw: bars("tokens_per_s", whole, "tokens/s"),
    about: "Median; whiskers from the lowest to the highest.",
  });
  if (!chosen().some((row) => row.speed_ratio)) return;
  add(grid, {
    id: "chart-ratio",
    title: `Speed, as a multiple of ${reference}`,
    draw: bars("speed_ratio", (v) => `${v.toFixed(3)} ×`, `speed to ${reference}`),
    about: "Within interleaved pairs, which a noisy machine slows alike. Above 1 is faster.",
  });
}
