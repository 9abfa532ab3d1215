"use strict";
// Light or dark: the reader's system decides, until the button does.
const root = document.documentElement;
const asked = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
const theme = () => { root.dataset.theme = chosen ?? (asked.matches ? "dark" : "light"); };
asked.addEventListener("change", theme);
theme();
document.getElementById("theme").addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  theme();
});
let before = null;
window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; });
window.addEventListener("afterprint", () => { root.dataset.theme = before; });

// A click on a heading sorts by it, another turns the order round; what has no value stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const [m, n] = [Number(x), Number(y)];
      const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// A click on a method shows it alone in the figures of its pair.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const pair = button.closest(".pair");
    const on = button.getAttribute("aria-pressed") === "true";
    for (const other of pair.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", "false");
    for (const mark of pair.querySelectorAll("svg .on")) mark.classList.remove("on");
    pair.classList.toggle("focus", !on);
    if (on) return;
    button.setAttribute("aria-pressed", "true");
    for (const mark of pair.querySelectorAll(`svg .${button.dataset.method}`)) mark.classList.add("on");
  });
}
