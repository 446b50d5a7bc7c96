// The charts of a report of runs.

const SMOOTH = 0.01; // of the run: the reach of the average to either side

/**
 * An exponential average to both sides, so that a falling curve is not shown late. It goes by steps, which may
 * lie unevenly because the log was thinned.
 */
function smoothed(xs, ys) {
  const reach = Math.max(1e-9, SMOOTH * ((xs.at(-1) ?? 1) - (xs[0] ?? 0)));
  const known = xs.map((_, index) => index).filter((index) => isNumber(ys[index]));
  const sums = new Map(known.map((index) => [index, { sum: -ys[index], weight: -1 }])); // both ways count it
  for (const order of [known, [...known].reverse()]) {
    let sum = 0,
      weight = 0,
      before = null;
    for (const index of order) {
      const kept = before === null ? 0 : Math.exp(-Math.abs(xs[index] - xs[before]) / reach);
      before = index;
      sum = kept * sum + ys[index];
      weight = kept * weight + 1;
      const both = sums.get(index);
      both.sum += sum;
      both.weight += weight;
    }
  }
  return ys.map((y, index) => (sums.has(index) ? sums.get(index).sum / sums.get(index).weight : y));
}

function runsReport(report) {
  const runs = report.runs.map((run, style) => ({ ...run, style }));
  const now = { x: "step" };
  const charts = [];
  const redraw = () => charts.forEach((draw) => draw());
  for (const id of ["recipe", "recorded"]) {
    const table = document.querySelector(`#${id} table`);
    if (table) filterable(table, id === "recipe" ? "Filter fields" : "Filter versions");
  }
  document.querySelectorAll("main table").forEach(sortable);
  markRuns(runs);

  const section = document.getElementById("charts");
  const hasTokens = runs.every((run) => run.train?.tokens?.length);
  section.append(
    h(
      "div",
      { class: "legend" },
      h(
        "div",
        { class: "chips" },
        ...runs.map((run) => h("span", { class: "chip" }, swatch(run.style), run.name)),
      ),
      hasTokens
        ? choice(
            "Against",
            [
              ["step", "steps"],
              ["tokens", "tokens"],
            ],
            "step",
            (value) => {
              now.x = value;
              redraw();
            },
          )
        : null,
    ),
  );
  const grid = h("div", { class: "charts" });
  section.append(grid);
  const context = { grid, runs, now, redraw, add: (spec) => charts.push(figure(grid, spec)) };
  runLoss(context);
  series(context, {
    key: "peak_bytes",
    id: "chart-peak",
    title: "Memory over time",
    unit: "bytes",
    write: bytes,
    levels: true,
    y: "peak so far",
    about: "The most held so far, with what was planned and the budget.",
  });
  series(context, {
    key: "tokens_per_s",
    id: "chart-rate",
    title: "Throughput",
    write: whole,
    y: "tokens/s",
    zero: true,
  });
  series(context, {
    key: "lr",
    id: "chart-lr",
    title: "Learning rate",
    write: (v) => digits(v, 4),
    y: "learning rate",
    zero: true,
  });
  series(context, {
    key: "grad_norm",
    id: "chart-norm",
    title: "Gradient norm",
    write: (v) => digits(v, 4),
    y: "norm, before clipping",
    log: true,
    smooth: true,
  });
  runMemory(context);
}

/** Show each run's line in the first table. */
function markRuns(runs) {
  for (const run of runs) {
    const line = document.querySelector(`#runs tr[data-name="${CSS.escape(run.name)}"]`);
    line.cells[0].prepend(h("span", { class: "pick" }, swatch(run.style)));
  }
}

const xAxis = (now) => ({
  title: now.x === "step" ? "optimizer steps" : "training tokens",
  short: (v) => counts(v, 3),
});

const tipAt = (run, now, x, rows) => ({
  title: run.name,
  swatch: swatch(run.style),
  rows: [[now.x === "step" ? "step" : "tokens", whole(x)], ...rows],
});

function runLoss({ runs, now, add, redraw }) {
  const logs = { x: false, y: false };
  const change = (axis) => (value) => {
    logs[axis] = value;
    redraw();
  };
  const layersOf = (run) => {
    const xs = run.train?.[now.x] ?? [],
      ys = run.train?.loss ?? [];
    const soft = smoothed(xs, ys);
    const raw = {
      key: `${run.name} raw`,
      name: run.name,
      style: run.style,
      kind: "line",
      faint: true,
      points: xs.map((x, index) => ({ x, y: ys[index] })),
    };
    const average = {
      key: `${run.name} training`,
      name: run.name,
      style: run.style,
      kind: "line",
      bold: true,
      points: xs.map((x, index) => ({
        x,
        y: soft[index],
        tip: isNumber(ys[index])
          ? tipAt(run, now, x, [
              ["training loss", loss(ys[index])],
              ["smoothed", loss(soft[index])],
            ])
          : null,
      })),
    };
    const held = {
      key: `${run.name} held-out`,
      name: run.name,
      style: run.style,
      kind: "both",
      dash: "thin",
      size: 4.5,
      points: (run.eval?.[now.x] ?? []).map((x, index) => ({
        x,
        y: run.eval.eval_loss?.[index],
        tip: isNumber(run.eval.eval_loss?.[index])
          ? tipAt(run, now, x, [
              ["held-out loss", loss(run.eval.eval_loss[index])],
              [
                "bits per byte",
                isNumber(run.eval.bits_per_byte?.[index]) ? loss(run.eval.bits_per_byte[index]) : null,
              ],
              [
                "perplexity",
                isNumber(run.eval.perplexity?.[index]) ? digits(run.eval.perplexity[index]) : null,
              ],
            ])
          : null,
      })),
    };
    return [raw, average, held];
  };
  add({
    id: "chart-loss",
    title: "Loss",
    wide: true,
    about: "Faint: every step; bold: its average over the steps around; marks: held-out loss.",
    controls: [toggle("log loss", false, change("y")), toggle("log steps", false, change("x"))],
    draw: (width) =>
      xyChart(
        {
          label: "loss",
          height: width < 500 ? 320 : 420,
          layers: runs
            .flatMap(layersOf)
            .filter((layer) => layer.points.length)
            .sort((a, b) => Boolean(b.faint) - Boolean(a.faint)),
          x: { ...xAxis(now), log: logs.x },
          y: { title: "loss, nats a token", log: logs.y, short: (v) => digits(v, 6) },
        },
        width,
      ),
  });
}

/** A chart of one column of the log against the steps. */
function series(
  { runs, now, add },
  { key, id, title, about, unit = "", write, y, zero = false, log = false, smooth = false, levels = false },
) {
  const shown = runs.filter((run) => run.train?.[key]?.some(isNumber));
  if (!shown.length) return;
  const layersOf = (run) => {
    const xs = run.train[now.x],
      ys = run.train[key];
    const soft = smooth ? smoothed(xs, ys) : ys;
    const line = {
      key: run.name,
      name: run.name,
      style: run.style,
      kind: "line",
      bold: true,
      points: xs.map((x, index) => ({
        x,
        y: soft[index],
        tip: isNumber(ys[index])
          ? tipAt(run, now, x, [
              [y, write(ys[index])],
              ["smoothed", smooth ? write(soft[index]) : null],
            ])
          : null,
      })),
    };
    const raw = {
      key: `${run.name} raw`,
      name: run.name,
      style: run.style,
      kind: "line",
      faint: true,
      points: xs.map((x, index) => ({ x, y: ys[index] })),
    };
    return smooth ? [raw, line] : [line];
  };
  const rules = levels ? shown.flatMap((run) => levelsOf(run, shown.length > 1)) : [];
  add({
    id,
    title,
    about,
    draw: (width) =>
      xyChart(
        {
          label: title,
          height: 300,
          layers: [...shown.flatMap(layersOf), ...joined(rules)],
          x: xAxis(now),
          y: {
            title: y,
            unit,
            zero,
            log,
            short: (v) => (unit === "bytes" ? bytes(v, 5) : v >= 1000 ? counts(v, 5) : digits(v, 6)),
          },
        },
        width,
      ),
  });
}

const levelsOf = (run, named) =>
  [
    ["predicted_bytes", "planned", "planned"],
    ["budget_bytes", "budget", "budget"],
  ]
    .filter(([key]) => isNumber(run[key]))
    .map(([key, rule, text]) => ({
      name: "",
      kind: "rule",
      rule,
      value: run[key],
      text,
      run: named ? run.name : "",
      points: [{ y: run[key] }],
    }));

/** Levels that are the same for several runs are drawn once. */
function joined(rules) {
  const found = new Map();
  for (const rule of rules) {
    const key = `${rule.rule} ${rule.value}`;
    const names = [...(found.get(key)?.names ?? []), rule.run].filter(Boolean);
    found.set(key, { ...rule, names });
  }
  return [...found.values()].map((rule) => ({
    ...rule,
    text: `${rule.text} ${bytes(rule.value, 3)}${rule.names.length === 1 ? ` (${rule.names[0]})` : ""}`,
  }));
}

function runMemory({ runs, add, redraw }) {
  for (const run of runs.filter((one) => one.memory)) {
    const kinds = [
      ["predicted", "planned"],
      ["measured", "measured"],
    ].filter(([kind]) => run.memory[kind]?.length);
    const moments = kinds.flatMap(([kind]) => run.memory[kind]);
    const names = [...new Set(moments.map((moment) => moment.name))];
    let fixed = !moments.some((moment) => fixedShare(moment) > 0.5);
    const rowOf = (name, kind, word, last) => {
      const moment = run.memory[kind].find((one) => one.name === name);
      if (!moment) return [];
      const terms = TERMS.filter((term) => fixed || term !== "fixed");
      const parts = partsOf(moment.terms, terms, name).map((part) => ({
        ...part,
        tip: part.tip(`${run.name}, ${word}`),
      }));
      const sum = parts.reduce((total, part) => total + part.value, 0);
      parts.forEach((part) => part.tip.rows.push(["in all", bytes(sum)]));
      return [
        { name: run.name, key: `${name} ${kind}`, text: `${name}, ${word}`, parts, end: bytes(sum, 3), last },
      ];
    };
    const key = termLegend(TERMS.filter((term) => moments.some((moment) => moment.terms[term] > 0)));
    key.classList.toggle("unfixed", !fixed);
    add({
      id: `chart-memory-${run.style}`,
      title: `Memory by moment: ${run.name}`,
      wide: true,
      about:
        "What was planned and what was measured, at every moment of a step. The fills are those of the plan.",
      controls: [
        key,
        toggle("with what is fixed", fixed, (value) => {
          fixed = value;
          key.classList.toggle("unfixed", !fixed);
          redraw();
        }),
      ],
      draw: (width) =>
        barChart(
          {
            label: "memory by moment and term",
            axis: { unit: "bytes", short: (v) => bytes(v, 3) },
            rows: names.flatMap((name) =>
              kinds.flatMap(([kind, word], index) => rowOf(name, kind, word, index === kinds.length - 1)),
            ),
          },
          width,
        ),
    });
  }
}
