// The start: reads the document, makes the page's own switches, and draws.

const report = JSON.parse(document.getElementById("document").textContent);

/** Light, dark, or as the system has it; the style sheet's colours follow `color-scheme`. */
function themeButton() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () =>
    (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const button = h("button", {
    type: "button",
    id: "theme",
    on: {
      click: () => {
        document.documentElement.dataset.theme = isDark() ? "light" : "dark";
        name();
      },
    },
  });
  const name = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  dark.addEventListener("change", name);
  name();
  return button;
}

/** The document as a file. It is made on demand: most readers never ask for it. */
function download() {
  const link = h(
    "a",
    {
      href: "#",
      id: "download",
      download: `${report.kind === "suite" ? `bench-${report.suite}` : "runs"}.json`,
    },
    "Download the figures as JSON",
  );
  link.addEventListener("click", () => {
    const url = URL.createObjectURL(
      new Blob([JSON.stringify(report, null, 1)], { type: "application/json" }),
    );
    link.href = url;
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
  return link;
}

document.documentElement.classList.add("scripted");
// An old browser shows the light colours alone.
if (CSS.supports("color", "light-dark(#000, #fff)")) document.querySelector("header").prepend(themeButton());
document.body.append(
  h("footer", {}, download(), h("span", { class: "quiet" }, " rounded to five digits")),
  tipBox,
  spoken,
);
if (report.kind === "suite") suiteReport(report);
else runsReport(report);
