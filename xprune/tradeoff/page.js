"use strict";
// The script of the page of a frontier. It draws the picture for the cost that the reader chooses, and explains the chosen budget.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), { layout, colours } = read("style");
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const PAPER = 670; // width in pixels of an A4 page without its margins
const element = (id) => document.getElementById(id);
// plotly reads some HTML tags in labels. Names come from the user, so they are escaped.
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
// Returns a metric as text, with its unit.
const metric = (x) => (data.metric.percent ? `${x.toFixed(1)} %` : Number(x.toPrecision(4)).toString());
const own = (more) => ({
  ...layout, ...more, xaxis: { ...layout.xaxis, ...more.xaxis }, yaxis: { ...layout.yaxis, ...more.yaxis },
});
let chosen = 0;

// Returns a line with markers through some points, for the chosen cost.
function line(points, cost, name, look) {
  const shown = points.filter((each) => cost in each.shares);
  return {
    type: "scatter", mode: "lines+markers", name, x: shown.map((each) => each.shares[cost]), y: shown.map((each) => each.metric),
    customdata: shown.map((each) => [each.name, metric(each.metric)]), ...look,
    hovertemplate: `budget %{customdata[0]}: ${escaped(data.metric.name)} %{customdata[1]} at %{x:.1f} %<extra>${escaped(name)}</extra>`,
  };
}

// Draws the metric against the chosen cost, with a ring around the chosen point.
function curve() {
  const cost = element("cost").value, point = data.points[chosen];
  const lines = [line(data.points, cost, data.criterion, {
    line: { color: colours.kept, width: 2 }, marker: { size: 9, color: colours.kept },
  })];
  if (data.chance.length) {
    lines.push(line(data.chance, cost, "chance", {
      line: { color: colours.removed, width: 1.5, dash: "dot" }, marker: { size: 6, color: colours.removed, symbol: "square" },
    }));
  }
  lines.push({
    type: "scatter", mode: "markers", name: "dense", x: [100], y: [data.dense.metric],
    marker: { size: 12, symbol: "circle-open", color: colours.ink, line: { width: 2 } },
    hovertemplate: `${escaped(data.metric.name)} ${metric(data.dense.metric)}<extra>dense</extra>`,
  });
  if (cost in point.shares) {
    lines.push({
      type: "scatter", mode: "markers", x: [point.shares[cost]], y: [point.metric], showlegend: false, hoverinfo: "skip",
      marker: { size: 20, symbol: "circle-open", color: colours.ink, line: { width: 2 } },
    });
  }
  return Plotly.react("curve", lines, own({
    height: 420, hovermode: "closest",
    shapes: [{
      type: "line", xref: "paper", x0: 0, x1: 1, y0: data.dense.metric, y1: data.dense.metric,
      line: { color: colours.ink, width: 1, dash: "dash" },
    }],
    xaxis: { title: { text: `${escaped(data.labels[cost])}, % of dense` }, rangemode: "tozero", ticksuffix: " %" },
    yaxis: { title: { text: escaped(data.metric.name) + data.metric.unit }, automargin: true },
  }), config);
}

// Returns the Python code that prunes to the budget of a point.
function code(point) {
  const settings = [`resources={"${data.resource}": ${point.asked}}`];
  if (["macs", "params", "latency"].includes(data.resource)) settings[0] = `${data.resource}=${point.asked}`;
  for (const [name, value] of Object.entries(data.more)) settings.push(`${name}=${JSON.stringify(value)}`);
  return `budget = xprune.Budget(${settings.join(", ")})\nresult = xprune.Pruner(model, ${JSON.stringify(data.criterion)}, budget).run(train, val)`;
}

// Explains the point with this index, and marks it in the picture and in the table.
function choose(index) {
  chosen = index;
  const point = data.points[index], change = point.metric - data.dense.metric;
  const by = data.metric.percent ? `${change.toFixed(1)} points` : Number(change.toPrecision(3)).toString();
  const costs = Object.entries(point.shares).map(([name, share]) => `${share.toFixed(1)} % of the ${data.labels[name]}`);
  const says = [
    `Its ${data.metric.name} is ${metric(point.metric)} as cut, a change of ${by} from the dense model.`,
    `It has ${costs.join(", ")}.`,
  ];
  if (point.latency !== null && data.dense.latency !== null && "latency" in point.shares) {
    says.push(`A forward pass takes ${point.latency.toFixed(1)} ms. It is ${(100 / point.shares.latency).toFixed(2)} times as fast as the dense model.`);
  }
  const chance = data.chance.find((each) => each.asked === point.asked);
  if (chance) says.push(`With random scores, the ${data.metric.name} is ${metric(chance.metric)}.`);
  element("chosen-text").replaceChildren(...says.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  element("chosen-title").textContent = `${point.name} of the ${data.labels[data.resource] ?? data.resource}: ${data.metric.name} ${metric(point.metric)}`;
  element("chosen-code").textContent = code(point);
  element("budget").value = String(index);
  for (const row of document.querySelectorAll("tr[data-row]")) row.classList.toggle("chosen", Number(row.dataset.row) === index);
  return curve();
}

// Draws how many of its units each site keeps at each budget.
function sites() {
  const names = data.sites.map((site) => escaped(site.name));
  const text = data.sites.map((site, i) => data.points.map((point) => `${point.counts[i]} of ${site.size} ${site.kinds}`));
  return Plotly.react("kept", [{
    type: "heatmap", x: data.points.map((point) => point.name), y: names, zmin: 0, zmax: 100, xgap: 2, ygap: 2, text,
    z: data.sites.map((site, i) => data.points.map((point) => 100 * point.counts[i] / site.size)),
    colorscale: [[0, "#f2f6fa"], [0.5, "#7fb0d8"], [1, "#08306b"]], showscale: false,
    hovertemplate: "%{y} at %{x}: %{text}<extra></extra>",
  }], own({
    height: 110 + 22 * names.length, margin: { ...layout.margin, t: 8 }, dragmode: false,
    xaxis: { title: { text: "budget" }, type: "category", fixedrange: true, showgrid: false },
    yaxis: { autorange: "reversed", automargin: true, fixedrange: true, showgrid: false, type: "category", dtick: 1 },
  }), config);
}

// Connects the lists and the picture to `choose`. Then draws everything.
async function start() {
  element("cost").addEventListener("change", curve);
  element("budget").addEventListener("change", () => choose(Number(element("budget").value)));
  // The point that a reader wants first: the smallest budget that loses little.
  const near = data.points.findLastIndex((each) => Math.abs(each.metric - data.dense.metric) <= 1);
  await choose(data.metric.percent && near >= 0 ? near : 0);
  element("curve").on("plotly_click", ({ points: [point] }) => {
    const index = point.data.name === "dense" ? -1 : data.points.findIndex((each) => each.name === point.customdata[0]);
    if (index >= 0) choose(index);
  });
  if (data.sites.length) await sites();
  document.body.dataset.ready = "true";
}

const drawn = ["curve", "kept"].filter((id) => element(id) !== null);
// On the screen, charts have the width of the window. For printing, they get the width of the paper.
addEventListener("beforeprint", () => drawn.forEach((id) => Plotly.relayout(id, { width: PAPER })));
addEventListener("afterprint", () => drawn.forEach((id) => Plotly.relayout(id, { width: null, autosize: true })));
start();
