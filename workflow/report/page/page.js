// Glue between the page's tables and JSON and the libraries: DataTables sorts and filters, Bokeh draws.
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", theme);
theme();

const options = (rows) => ({
  order: [],
  autoWidth: false,
  paging: rows > 25,
  pageLength: 25,
  ordering: { indicators: true, handler: true },
  columnControl: [{ target: 0, content: [] }, { target: 1, content: ["search"] }],
  layout: { topStart: "info", topEnd: rows > 1 ? "search" : null, bottomStart: rows > 25 ? "pageLength" : null },
});
for (const table of document.querySelectorAll("table.sortable")) {
  const rows = table.tBodies[0].rows.length;
  new DataTable(table, rows > 8 ? options(rows) : { ...options(rows), columnControl: [], layout: { topStart: null, topEnd: null, bottomStart: null } });
}

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { cells, shapes, number, layer } = read("drill");
const choice = document.getElementById("choice");
cells.forEach(({ spec }, i) => {
  const where = [spec.model, spec.calibration, spec.mode, spec.label, spec.target, `seed ${spec.seed}`, spec.cell];
  choice.add(new Option(where.join(" · "), i));
});

const element = (tag, text, parent) => {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  return parent ? parent.appendChild(made) : made;
};
// Values arrive as text, never as HTML.
const text = DataTable.render.text();
const columns = (names) => names.map((title) => ({ title: element("i", title).innerHTML, render: text, defaultContent: "" }));
const numbers = new DataTable("#cell-numbers", { ...options(0), columns: columns(number), layout: { topStart: null, topEnd: null, bottomStart: null }, columnControl: [] });
const layers = new DataTable("#table-layers", { ...options(100), columns: columns(layer) });
const filled = (table, rows) => table.clear().rows.add(rows).draw();

const item = read("bokeh");
const [view] = await Bokeh.embed.embed_item(item).then((made) => made.roots ?? [...made]);
const plot = view.model;
const sources = new Map(plot.renderers.map(({ data_source }) => [data_source.name, data_source]));

function pairs(id, named) {
  const table = document.getElementById(id);
  table.replaceChildren();
  for (const [name, value] of Object.entries(named)) {
    if (value === null) continue;
    const row = table.insertRow();
    element("th", name, row);
    element("td", value, row);
  }
}

function range(axis, start, end) {
  axis.setv({ start, end, reset_start: start, reset_end: end });
}

function show(index) {
  const { spec, folder, log, provenance, gaps, numbers: own, layers: found, status } = cells[index];
  choice.value = index;
  pairs("cell-spec", { ...spec, status, folder, log });
  pairs("cell-provenance", provenance);
  const reasons = document.getElementById("cell-gaps");
  reasons.replaceChildren();
  for (const reason of new Set(gaps.map((gap) => gap[3]))) element("p", reason, reasons).className = "warning";
  filled(numbers, own);
  document.getElementById("cell-layers").hidden = !found;
  const whole = found ? { ...shapes[found.shape], ...found } : { row: [] };
  filled(layers, whole.row.map((_, i) => layer.map((name) => whole[name][i])));
  const errors = (whole.output_error ?? []).filter((value) => value > 0);
  if (errors.length) range(plot.y_range, Math.min(...errors) / 1.2, Math.max(...errors) * 1.2);
  if (found) range(plot.x_range, -0.5, Math.max(...whole.block) + 0.5);
  for (const [kind, source] of sources) {
    const at = whole.row.map((_, i) => i).filter((i) => whole.kind[i] === kind);
    const pick = (name) => at.map((i) => whole[name][i]);
    const error = pick("output_error").map((value) => (value > 0 ? value : NaN));
    source.data = { block: pick("block"), error, layer: pick("layer") };
  }
  // Bokeh's first layout, and one that was made while the chart was hidden, has a plot without height.
  requestAnimationFrame(() => view.invalidate_layout());
}

function follow() {
  const [, index] = /^#cell-(\d+)$/.exec(location.hash) ?? [];
  if (index in cells) {
    show(Number(index));
    document.getElementById("cell").scrollIntoView();
  }
}
choice.addEventListener("change", () => { location.hash = `#cell-${choice.value}`; });
addEventListener("hashchange", follow);
// A dense cell has no errors to draw.
if (cells.length) show(Math.max(0, cells.findIndex(({ layers }) => layers?.output_error.some((value) => value > 0))));
follow();
document.documentElement.dataset.ready = "yes";
