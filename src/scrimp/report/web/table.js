// Tables that sort by a click or a key on a heading, and a box that filters their rows.

const cellOf = (row, index) => {
  const cell = row.children[index];
  return cell && cell.dataset.value !== undefined ? cell.dataset.value : null;
};

/** Order two values: numbers as such, words by the alphabet, and what is missing last in both directions. */
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  const [left, right] = [Number(a), Number(b)];
  const order =
    a !== "" && b !== "" && !Number.isNaN(left) && !Number.isNaN(right)
      ? left - right
      : a.localeCompare(b, "en", { numeric: true });
  return direction * order;
}

function sortable(table) {
  const body = table.tBodies[0];
  const first = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const sort = () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      // From the first order each time: equal rows then stand as they were written.
      body.append(...[...first].sort((a, b) => compare(cellOf(a, index), cellOf(b, index), direction)));
    };
    const button = h("button", { type: "button", on: { click: sort } });
    button.append(...head.childNodes);
    head.append(button);
  });
}

/** Put a box above a table that leaves only the rows that hold every word typed. */
function filterable(table, placeholder) {
  const count = h("span", { class: "quiet", role: "status" });
  const rows = [...table.tBodies[0].rows];
  const apply = () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => {
      row.hidden = !wanted.every((word) => row.textContent.toLowerCase().includes(word));
    });
    const left = rows.filter((row) => !row.hidden).length;
    count.textContent = wanted.length ? `${left} of ${rows.length}` : "";
  };
  const input = h("input", {
    type: "search",
    placeholder,
    "aria-label": placeholder,
    spellcheck: "false",
    on: { input: apply },
  });
  const bar = h("div", { class: "filter" }, input, count);
  table.parentElement.before(bar);
  return bar;
}
