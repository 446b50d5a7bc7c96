// Scales: from values to pixels, with ticks at round values.

const ROUND = [1, 2, 2.5, 5, 10];

/** The round step that makes at most `most` of `span`, in units of `unit`. */
function roundStep(span, most, unit) {
  const raw = span / unit / Math.max(1, most);
  // Parts of a binary unit are halves: a quarter of a GiB is 256 MiB, a fifth is 204.8.
  if (unit > 1 && raw < 1) return unit * 2 ** -Math.floor(-Math.log2(raw) + 1e-9);
  const power = 10 ** Math.floor(Math.log10(raw));
  return unit * power * ROUND.find((n) => power * n >= raw * (1 - 1e-9));
}

/** Bytes are round in binary units: 512 MiB, not 536.9 million. */
const byteUnit = (high) =>
  1024 ** Math.max(0, Math.floor(Math.log(Math.max(high, 1)) / Math.log(1024) + 1e-9));

function linearTicks([low, high], most, unit) {
  const step = roundStep(high - low || 1, most, unit);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) {
    ticks.push(Number((n * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks([low, high], most) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    decades.push(power);
  const within = (factors) =>
    decades
      .flatMap((power) => factors.map((factor) => Number((factor * 10 ** power).toPrecision(3))))
      .filter((tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9));
  const found = [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(within).find((ticks) => ticks.length <= most);
  if (found && found.length > 1) return found;
  const every = Math.ceil(decades.length / Math.max(1, most));
  const sparse = within([1]).filter((_, index) => index % every === 0);
  return sparse.length > 1 ? sparse : linearTicks([low, high], most, 1);
}

/**
 * A scale of `domain` onto `range` (pixels).
 * `most` ticks at most; `unit` "bytes" has ticks at binary amounts.
 */
function scale({ domain, range, log = false, unit = "", most = 5 }) {
  const turn = log ? Math.log10 : (value) => value;
  const [low, high] = domain.map(turn);
  const at = (value) => range[0] + ((turn(value) - low) / (high - low || 1)) * (range[1] - range[0]);
  const step = unit === "bytes" ? byteUnit(domain[1]) : 1;
  return { at, log, domain, ticks: log ? logTicks(domain, most) : linearTicks(domain, most, step) };
}

/** The domain of values, with room around them; `zero` starts it there, and a log scale takes only positive ones. */
function domainOf(values, { log = false, zero = false, room = 0.05 } = {}) {
  const kept = values.filter((value) => isNumber(value) && (!log || value > 0));
  if (!kept.length) return null;
  let low = Infinity,
    high = -Infinity; // by hand: the arguments of Math.min are limited in number
  for (const value of kept) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (log) {
    const factor = low === high ? 1.5 : (high / low) ** room;
    return [low / factor, high * factor];
  }
  if (zero) return [Math.min(0, low * (1 + room)), Math.max(0, high * (1 + room)) || 1];
  const around = (high - low || Math.abs(high) * 0.1 || 1) * room;
  return [low - around, high + around];
}
