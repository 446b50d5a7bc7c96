// The charts of a report of runs.

function runsReport(report) {
  const runs = report.runs.map((run, style) => ({ ...run, style }));
  const now = { x: "step" };
  const charts = [];
  const redraw = () => charts.forEach((draw) => draw());
  for (const id of ["recipe", "recorded"]) {
    const table = document.querySelector(`#${id} table`);
    if (table) filterable(table, id === "recipe" ? "Filter fields" : "Filter versions");
  }
  markRuns(runs);
  document.querySelectorAll("main table").forEach(sortable);

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
    about: runs.some((run) => run.peak_of === "allocator")
      ? "The most held so far, with what was planned and the budget. On CUDA: what the allocator gave out, and the plan without the context."
      : "The most held so far, with what was planned and the budget.",
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
  const { rows } = document.querySelector("#runs table").tBodies[0];
  for (const run of runs) {
    // By its place: a name may hold what neither a page nor a selector keeps as it is.
    const line = rows[run.style];
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
    const soft = run.train?.loss_average ?? [];
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
              ["average around", isNumber(soft[index]) ? loss(soft[index]) : null],
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
    about:
      "Faint: the steps; bold: the average of all steps around each, before and after; marks: held-out loss.",
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
    const soft = smooth ? run.train[`${key}_average`] ?? [] : ys;
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
              ["average around", smooth && isNumber(soft[index]) ? write(soft[index]) : null],
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
          layers: [...shown.flatMap(layersOf), ...rules],
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
      text,
      write: (value) => bytes(value, 3),
      of: named ? run.name : "",
      points: [{ y: run[key] }],
    }));

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
