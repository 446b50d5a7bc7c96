// The one tooltip. A chart gives targets (a place, a key, what to say); the pointer takes the nearest one, the
// arrow keys go from one to the next: left and right along a series, up and down between series.

const tipBox = h("div", { id: "tip", "aria-hidden": "true", hidden: true });
// What is said to those who cannot see it: on keys alone, since a pointer that passes would never stop talking.
const spoken = h("div", { id: "spoken", class: "unseen", role: "status", "aria-live": "polite" });
const REACH = 60; // pixels within which a point answers to the pointer

const told = (tip) => tip.rows.filter(([, value]) => value !== null && value !== undefined);

function say(tip) {
  spoken.textContent = [tip.title, ...told(tip).map(([name, value]) => `${name} ${value}`.trim())].join(", ");
}

function showTip(tip, x, y) {
  const rows = told(tip);
  tipBox.replaceChildren(
    h("b", {}, tip.swatch ?? null, tip.title),
    h("dl", {}, ...rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]).flat()),
  );
  tipBox.hidden = false;
  // It stays on screen: beside the point, or on its other side, never under the finger.
  const { width, height } = tipBox.getBoundingClientRect();
  const right = x + 14 + width <= document.documentElement.clientWidth - 8;
  const left = right ? x + 14 : Math.max(8, x - 14 - width);
  const top = y - height - 12 >= 8 ? y - height - 12 : Math.min(y + 16, window.innerHeight - height - 8);
  // In the page's coordinates: it scrolls with its chart.
  tipBox.style.left = `${window.scrollX + Math.max(8, Math.min(left, document.documentElement.clientWidth - width - 8))}px`;
  tipBox.style.top = `${window.scrollY + Math.max(8, top)}px`;
}

function hideTip() {
  tipBox.hidden = true;
  document.querySelectorAll(".cursor").forEach((cursor) => cursor.setAttribute("visibility", "hidden"));
}

const distance = (target, x, y) =>
  target.box
    ? Math.hypot(
        Math.max(target.box.x - x, 0, x - target.box.x - target.box.width),
        Math.max(target.box.y - y, 0, y - target.box.y - target.box.height),
      )
    : Math.hypot(target.x - x, target.y - y);

function nearest(targets, x, y) {
  let best = null,
    least = REACH;
  for (const target of targets) {
    const far = distance(target, x, y);
    if (far < least) [best, least] = [target, far];
  }
  return best;
}

/** The index of the target that an arrow key leads to. */
function step(targets, index, key) {
  if (index < 0) return 0;
  if (key === "Home") return 0;
  if (key === "End") return targets.length - 1;
  const current = targets[index];
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const next = index + (key === "ArrowRight" ? 1 : -1);
    return targets[next]?.key === current.key ? next : index;
  }
  const keys = [...new Set(targets.map((target) => target.key))];
  const wanted = keys[keys.indexOf(current.key) + (key === "ArrowDown" ? 1 : -1)];
  if (wanted === undefined) return index;
  const others = targets.filter((target) => target.key === wanted);
  const closest = others.reduce((a, b) => (Math.abs(b.x - current.x) < Math.abs(a.x - current.x) ? b : a));
  return targets.indexOf(closest);
}

/** Let the pointer, a finger and the keyboard ask an SVG for its targets. */
function answer(svg, targets) {
  const cursor = s("circle", { class: "cursor", r: 8, visibility: "hidden", "aria-hidden": "true" });
  svg.append(cursor);
  let index = -1;
  const show = (target) => {
    const box = svg.getBoundingClientRect();
    cursor.setAttribute("cx", target.x);
    cursor.setAttribute("cy", target.y);
    cursor.setAttribute("visibility", target.box ? "hidden" : "visible");
    index = targets.indexOf(target);
    showTip(target.tip, box.left + target.x, box.top + target.y);
  };
  const byPointer = (event) => {
    const box = svg.getBoundingClientRect();
    const target = nearest(targets, event.clientX - box.left, event.clientY - box.top);
    if (target) show(target);
    else hideTip();
  };
  const byKey = (event) => {
    if (event.key === "Escape") return hideTip();
    if (!/^(Arrow|Home$|End$)/.test(event.key) || !targets.length) return undefined;
    event.preventDefault();
    show(targets[step(targets, index, event.key)]);
    return say(targets[index].tip);
  };
  svg.addEventListener("pointermove", byPointer);
  svg.addEventListener("pointerdown", byPointer);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hideTip());
  svg.addEventListener("keydown", byKey);
  svg.addEventListener("focus", () => {
    // A pointer that focuses the chart has its own point already.
    if (!svg.matches(":focus-visible") || !targets.length) return;
    show(targets[Math.max(0, index)]);
    say(targets[index].tip);
  });
  svg.addEventListener("blur", hideTip);
}
