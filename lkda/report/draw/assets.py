"""The JavaScript that a page carries with it, from wheels: Vega-Lite for charts, and DataTables for tables."""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files

# Tables are sorted by their headings and filtered by the fields below them; charts follow the theme of the device.
_GLUE = """
import DataTable from "data:text/javascript;base64,DATATABLES";
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = JSON.parse(document.getElementById("charts").textContent);
const draw = () => {
  document.documentElement.classList.toggle("dark", dark.matches);
  for (const [name, chart] of Object.entries(charts)) {
    vegaEmbed(`#${name}`, chart.spec, {
      config: dark.matches ? chart.dark : chart.light, renderer: "svg", downloadFileName: name,
      tooltip: {theme: dark.matches ? "dark" : "light"},
      actions: {export: true, source: false, compiled: false, editor: false},
    }).catch(error => console.error(name, error));
  }
};
dark.addEventListener("change", draw);
draw();
// A field for numbers: compares what a column is sorted by, and takes what cells say, as in 1.14 MiB or 8K.
const FACTORS = {"": 1, k: 1e3, M: 1e6, G: 1e9, T: 1e12, "%": 0.01, B: 1, K: 2 ** 10, KiB: 2 ** 10, MiB: 2 ** 20,
  GiB: 2 ** 30};
const quantity = text => {
  const [, digits, unit] = text.trim().replaceAll(",", "").match(/^(-?\\d*\\.?\\d+(?:e[+-]?\\d+)?) ?(\\w*%?)$/) ?? [];
  if (digits === undefined || FACTORS[unit] === undefined) return null;
  const [number, exponent] = digits.split("e");
  const decimals = (number.split(".")[1] ?? "").length - Number(exponent ?? 0);
  return {value: Number(digits) * FACTORS[unit], half: 0.5 * 10 ** -decimals * FACTORS[unit]};
};
const HOLDS = {
  equal: (x, {value, half}) => Math.abs(x - value) <= half, notEqual: (x, {value, half}) => Math.abs(x - value) > half,
  greater: (x, {value}) => x > value, greaterOrEqual: (x, {value, half}) => x >= value - half,
  less: (x, {value}) => x < value, lessOrEqual: (x, {value, half}) => x <= value + half,
};
const LABELS = {equal: "equals", notEqual: "does not equal", greater: "greater than", greaterOrEqual: "at least",
  less: "less than", lessOrEqual: "at most"};
DataTable.ColumnControl.content.quantity = {defaults: {}, init() {
  const table = this.dt(), n = this.idx();
  return new DataTable.ColumnControl.SearchInput(table, n, this.idxOriginal()).clearable(true)
    .options(Object.entries(LABELS).map(([value, label]) => ({label, value})))
    .search((condition, typed) => {
      const limit = typed.trim() ? quantity(typed) : undefined;
      table.column(n).search.fixed("quantity", limit === undefined ? null : (text, row, at) => {
        const cell = table.cell(at, n).node();
        return limit !== null && cell.textContent !== "" && HOLDS[condition](Number(cell.dataset.order), limit);
      }).draw();
    }).element();
}};
const numbers = (table, n) =>
  [...table.tBodies[0].rows].every(({cells}) => cells[n].dataset.order && !isNaN(cells[n].dataset.order));
document.addEventListener("click", tap => {  // a finger does not hover: a tap on a mark shows its tooltip
  const at = {bubbles: true, clientX: tap.clientX, clientY: tap.clientY};
  if (tap.pointerType === "touch" && tap.target.closest(".chart svg"))
    tap.target.dispatchEvent(new PointerEvent("pointermove", at));
});
addEventListener("touchmove", () => document.getElementById("vg-tooltip-element")?.classList.remove("visible"));
for (const table of document.querySelectorAll("table.sortable")) {
  new DataTable(table, {
    order: [], pageLength: 15, lengthMenu: [15, 50, {label: "all", value: -1}], autoWidth: false,
    ordering: {indicators: true, handler: true},
    columnDefs: [...table.tHead.rows[0].cells].map((_, n) => ({targets: n, columnControl: [{target: 1, content: [
      JSON.parse(table.dataset.lists).includes(n) ? {extend: "dropdown", text: "choose", content: ["searchList"]}
        : numbers(table, n) ? "quantity" : "searchText"]}]})),
  });
  const scrolled = table.parentElement;
  for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", table.ariaLabel]])
    scrolled.setAttribute(name, value);
}
const wide = new ResizeObserver(() => {
  for (const {parentElement: box} of document.querySelectorAll(".scroll table"))
    box.toggleAttribute("data-wide", box.scrollWidth > box.clientWidth + 1);
});
document.querySelectorAll(".scroll table, body").forEach(seen => wide.observe(seen));
document.documentElement.dataset.ready = "true";
"""


@cache
def scripts() -> str:
    """The elements that make the page's charts and tables interactive. They come last in the body.

    The page has an element with the id "charts": {id of an element: what `Chart.embedded` returns} as JSON.
    """
    import vl_convert

    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    tables = _datatables("dt_bundle.js")
    glue = _GLUE.replace("DATATABLES", base64.b64encode(tables.encode()).decode())
    return f'<script type="module">{vega}</script>\n<script type="module">{glue}</script>'


@cache
def styles() -> str:
    """The style sheet of sortable tables."""
    return _datatables("dt_bundle.css").replace("</style", "<\\/style")


def _datatables(name: str) -> str:
    return (files("itables") / "html" / name).read_text(encoding="utf-8")
