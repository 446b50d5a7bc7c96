// Elements and numbers. All scripts of the report share one function scope (page.py), so that nothing is global.

const SVG = "http://www.w3.org/2000/svg";
const TERMS = [...document.querySelectorAll("pattern[data-term]")].map((pattern) => pattern.dataset.term);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") Object.entries(value).forEach(([event, act]) => node.addEventListener(event, act));
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Make an HTML element; `on` holds its listeners, `true` is an attribute without a value. */
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** Make an SVG element. */
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Write a number with so many significant digits, without the zeros that say nothing. */
function digits(value, count = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4)
    return value
      .toExponential(count - 1)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  return String(Number(value.toPrecision(count))).replace("-", "−");
}

function scaled(value, base, units, count) {
  let left = value,
    index = 0;
  while (Math.abs(left) >= 999.5 && index < units.length - 1) {
    left /= base;
    index += 1;
  }
  return `${digits(left, count)} ${units[index]}`.trim();
}

// As scrimp.base.units writes them, but for the digits.
const bytes = (value, count = 4) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"], count);
const counts = (value, count = 4) => scaled(value, 1000, ["", "K", "M", "B", "T"], count);
const whole = (value) => Math.round(value).toLocaleString("en");
const loss = (value) => value.toFixed(4);

/** Write a spread as its median and its ends. */
function spreadText(spread, write) {
  const same = spread.lowest === spread.highest || !isNumber(spread.lowest) || !isNumber(spread.highest);
  return same
    ? write(spread.median)
    : `${write(spread.median)} (${write(spread.lowest)} to ${write(spread.highest)})`;
}

const CANVAS = document.createElement("canvas").getContext("2d");
/** The width of a chart's text, in pixels. */
function textWidth(text, weight = "") {
  CANVAS.font = `${weight} 12px ${getComputedStyle(document.body).fontFamily}`;
  return CANVAS.measureText(text).width;
}

function cut(text, room) {
  if (textWidth(text) <= room) return text;
  let kept = text;
  while (kept && textWidth(`${kept}…`) > room) kept = kept.slice(0, -1);
  return `${kept}…`;
}
