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
document.addEventListener("click", tap => {  // a finger does not hover: a tap on a mark shows its tooltip
  const at = {bubbles: true, clientX: tap.clientX, clientY: tap.clientY};
  if (tap.pointerType === "touch" && tap.target.closest(".chart svg"))
    tap.target.dispatchEvent(new PointerEvent("pointermove", at));
});
for (const table of document.querySelectorAll("table.sortable")) {
  new DataTable(table, {
    order: [], pageLength: 15, lengthMenu: [15, 50, {label: "all", value: -1}], autoWidth: false,
    ordering: {indicators: true, handler: true}, columnControl: [{target: 1, content: ["search"]}],
    columnDefs: [{
      targets: JSON.parse(table.dataset.lists),
      columnControl: [{target: 1, content: [{extend: "dropdown", text: "choose", content: ["searchList"]}]}],
    }],
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
