// The charts of a suite that show losses: against tokens, against memory, and over the learning rates tried.

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
  const starts = layers
    .map(({ points }) => points.findIndex((point) => isNumber(point.y) && point.y <= ceiling))
    .map((index, layer) => (index < 0 ? Infinity : layers[layer].points[Math.max(0, index - 1)].x));
  const start = Math.min(...starts);
  for (const layer of layers) layer.points = layer.points.filter((point) => point.x >= start);
}

/**
 * The seed whose final loss is the median, of an even number the upper of the two: a run that was, not an average
 * that was not. One that diverged is above all others, and if it is the median there is none.
 */
function medianSeed(curves) {
  const end = (curve) => curve.loss ?? Infinity;
  const ended = [...curves].sort((a, b) => (end(a) < end(b) ? -1 : end(a) > end(b) ? 1 : 0));
  const found = ended[Math.floor(ended.length / 2)];
  return found && end(found) < Infinity ? found : null;
}

/** Say which methods a chart leaves out, and why. */
const beneath = (word, texts) => (texts.length ? [empty(`${word}: ${texts.join(", ")}.`)] : []);

/** Name the losses that a close-up leaves out, and the methods that have none since they diverged. */
const leftAbove = (rows, ceiling) => [
  ...beneath(
    "Above the close-up",
    rows
      .filter((row) => ceiling && row.loss?.median > ceiling)
      .map((row) => `${row.name} ${row.loss.median.toFixed(2)}`),
  ),
  ...beneath(
    "Diverged",
    rows.filter((row) => !row.loss && row.curves?.some((curve) => curve.loss === null)).map((row) => row.name),
  ),
];

function lossChart(grid, add, redraw, chosen, tipOf, protocol) {
  const now = { what: "eval", log: false, close: true };
  const change = (name) => (value) => {
    now[name] = value;
    redraw();
  };
  const layersOf = (row) => {
    const bold = medianSeed(row.curves);
    return [...(row.curves ?? [])]
      .sort((a, b) => (a === bold) - (b === bold))
      .map((curve) => {
        const xs = (now.what === "eval" ? curve.eval_tokens : curve.tokens) ?? [];
        const ys = (now.what === "eval" ? curve.eval : curve.train) ?? [];
        const points = xs.map((x, index) => ({ x, y: ys[index] }));
        for (const point of points) {
          if (!isNumber(point.y)) continue;
          point.tip = tipOf(row, [
            ["tokens", whole(point.x)],
            [now.what === "eval" ? "held-out loss" : "training loss", loss(point.y)],
            ["seed", curve.seed],
            ["lr", isNumber(curve.lr) ? digits(curve.lr, 3) : null],
          ]);
        }
        return {
          key: `${row.name} ${curve.seed}`,
          name: row.name,
          style: row.style,
          kind: "line",
          points,
          faint: curve !== bold,
          bold: curve === bold,
        };
      });
  };
  const draw = (width) => {
    const rows = chosen().filter((row) => row.curves?.length);
    const layers = rows.flatMap(layersOf).sort((a, b) => b.faint - a.faint);
    const wanted = now.close ? ceilingOf(rows.map((row) => row.loss?.median)) : undefined;
    // Training loss may stay above what held-out loss asks for: then there is nothing to look at closely.
    const ceiling = layers.some(({ points }) => points.some(({ y }) => isNumber(y) && y <= wanted))
      ? wanted
      : undefined;
    const even = rows.some((row) => row.curves.length % 2 === 0);
    if (ceiling) fromTheCeiling(layers, ceiling);
    if (isNumber(protocol?.target_loss) && layers.length) {
      layers.push({
        name: "",
        kind: "rule",
        rule: "budget",
        text: "target",
        write: (value) => digits(value),
        points: [{ y: protocol.target_loss }],
      });
    }
    const what = now.what === "eval" ? "held-out loss" : "training loss";
    const svg = xyChart(
      {
        label: `${what} against tokens`,
        height: width < 500 ? 320 : 420,
        layers,
        x: { title: "training tokens", log: now.log, short: (v) => counts(v, 3) },
        y: { title: `${what}, nats a token`, ceiling, short: (v) => digits(v, 6) },
      },
      width,
    );
    return [
      svg,
      ...leftAbove(rows, ceiling),
      ...(even ? [empty("Of an even number of seeds the bold one is the upper of the two in the middle.")] : []),
    ];
  };
  add(grid, {
    id: "chart-loss",
    title: "Loss against tokens",
    wide: true,
    draw,
    about:
      "Bold: the run of the median seed; faint: the other seeds. The close-up cuts what lies far above most.",
    controls: [
      choice(
        "Loss",
        [
          ["eval", "held-out"],
          ["train", "training"],
        ],
        "eval",
        change("what"),
      ),
      toggle("log tokens", false, change("log")),
      toggle("close-up", true, change("close")),
    ],
  });
}

/** Those that no other beats in both memory and loss, from the least memory. */
function paretoFront(points) {
  let best = Infinity;
  return [...points]
    .sort((a, b) => a.x - b.x || a.y - b.y)
    .filter((point) => {
      if (point.y >= best) return false;
      best = point.y;
      return true;
    });
}

function frontChart(grid, add, redraw, chosen, tipOf, measured) {
  const axes = [
    ["tensor_bytes", "tensors", "peak of live tensors"],
    ["peak_bytes", "resident", "peak resident memory of the process"],
    ["state_bytes", "state", "optimizer state"],
  ].filter(([key]) => measured.some((row) => isNumber(row[key]) && row.loss));
  if (!axes.length) return;
  let [key] = axes[0];
  let close = true;
  const draw = (width) => {
    const [, short, title] = axes.find(([name]) => name === key);
    const has = (row) => isNumber(row[key]) && isNumber(row.loss?.median);
    const rows = chosen().filter(has);
    const unknown = chosen().filter((row) => row.loss && !isNumber(row[key]));
    const ceiling = close ? ceilingOf(rows.map((row) => row.loss.median)) : undefined;
    const layers = rows.map((row) => ({
      key: "points",
      name: row.name,
      style: row.style,
      kind: "points",
      size: 5.5,
      points: [
        {
          x: row[key],
          y: row.loss.median,
          low: row.loss.lowest,
          high: row.loss.highest,
          text: row.name,
          tip: tipOf(row, [
            [title, bytes(row[key])],
            ["held-out loss", spreadText(row.loss, loss)],
          ]),
        },
      ],
    }));
    // Of all that were measured: a front does not change with what is picked.
    const front = paretoFront(measured.filter(has).map((row) => ({ x: row[key], y: row.loss.median })));
    const isBest = ({ x, y }) => front.some((point) => point.x === x && point.y === y);
    // From the left, for the arrow keys; those on the front get their labels first.
    layers.sort((a, b) => a.points[0].x - b.points[0].x);
    for (const {
      points: [point],
    } of layers)
      point.first = isBest(point);
    if (front.length && rows.length) layers.unshift({ key: "front", name: "", kind: "front", points: front });
    const svg = xyChart(
      {
        label: `held-out loss against ${title}`,
        height: 360,
        layers,
        x: { title, unit: "bytes", room: 0.08, short: (v) => bytes(v, 5) },
        y: {
          title: "held-out loss, nats a token",
          short: (v) => digits(v, 6),
          room: 0.12,
          ceiling,
        },
      },
      width,
    );
    return [
      svg,
      ...beneath(
        "Not shown",
        unknown.map((row) => `${row.name} (no ${short} measured)`),
      ),
      ...leftAbove(rows, ceiling),
    ];
  };
  add(grid, {
    id: "chart-front",
    title: "Loss against memory",
    draw,
    about:
      "Lower and further left is better; the line joins those that no other beats in both (Pareto front), picked or not. Whiskers: lowest to highest seed.",
    controls: [
      choice(
        "Memory",
        axes.map(([name, text]) => [name, text]),
        key,
        (value) => {
          key = value;
          redraw();
        },
      ),
      toggle("close-up", true, (value) => {
        close = value;
        redraw();
      }),
    ],
  });
}

function searchChart(grid, add, redraw, chosen, tipOf) {
  let close = true;
  const draw = (width) => {
    const rows = chosen().filter((row) => row.trials?.length);
    const layers = rows.map((row) => ({
      key: row.name,
      name: row.name,
      style: row.style,
      kind: "both",
      points: [...row.trials]
        .sort((a, b) => a.lr - b.lr || a.seed - b.seed)
        .map((trial) => ({
          x: trial.lr,
          y: trial.loss,
          lost: !isNumber(trial.loss),
          chosen: trial.lr === row.lr,
          tip: tipOf(row, [
            ["lr", digits(trial.lr, 3)],
            ["held-out loss", isNumber(trial.loss) ? loss(trial.loss) : "diverged"],
            ["seed", trial.seed],
            ["", trial.lr === row.lr ? "chosen" : null],
          ]),
        })),
    }));
    return xyChart(
      {
        label: "held-out loss against learning rate",
        empty: rows.length ? "Every trial of what is picked diverged." : undefined,
        height: 360,
        layers,
        x: {
          title: "learning rate",
          log: true,
          room: 0.06,
          short: (v) => digits(v, 3),
          at: [...new Set(rows.flatMap((row) => row.trials.map((trial) => trial.lr)))],
        },
        y: {
          title: "held-out loss, nats a token",
          short: (v) => digits(v, 6),
          ceiling: close
            ? ceilingOf(
                rows.flatMap((row) => row.trials.map((trial) => trial.loss)),
                2,
              )
            : undefined,
        },
      },
      width,
    );
  };
  add(grid, {
    id: "chart-search",
    title: "Learning-rate search",
    draw,
    about:
      "Every trial of the search; a ring marks the rate that was chosen, a cross at the top a trial that diverged, an arrow one beyond the close-up.",
    controls: [
      toggle("close-up", true, (value) => {
        close = value;
        redraw();
      }),
    ],
  });
}
