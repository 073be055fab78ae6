"use strict";
// The script of the report. It draws the charts, whose data are in the page as JSON, and explains the unit that the reader chooses.
// When the pointer is on a cell of a class map, it prints the cell as text.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures"), units = read("units"), { layout, colours } = read("style");
const config = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};
const PAPER = 670; // width in pixels of an A4 page without its margins
const drawn = []; // the elements that hold a chart. Printing changes their width

// Draws a chart in the element with this id. Replaces a chart that is already there.
function draw(id, data, own) {
  const place = document.getElementById(id);
  const done = Plotly.react(place, data, own, config);
  if (!drawn.includes(place)) drawn.push(place);
  return done;
}

// plotly reads some HTML tags in labels. Names of classes come from the user, so they are escaped.
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
// Returns the layout of one chart: the shared layout with the settings in `more`.
const own = (more) => ({
  ...layout, ...more, xaxis: { ...layout.xaxis, ...more.xaxis }, yaxis: { ...layout.yaxis, ...more.yaxis },
});
// Returns a number as text with three digits.
const figure = (x) => Number(x.toPrecision(3)).toString();

// Shows why the unit with this index was kept or removed: writes the heading and the sentences, and draws the charts of scores and
// classes.
function why(index) {
  const unit = units.units[index], site = units.sites[unit.site];
  const near = units.units.map((each, i) => [each, i]).filter(([each]) => each.site === unit.site);
  const says = [
    site.cut === null
      ? `Its score is ${figure(unit.score)}. The site kept no ${site.kind}.`
      : `Its score is ${figure(unit.score)}. The lowest score that the site kept is ${figure(site.cut)}.`,
    `It ranks ${unit.rank} of ${site.size} in its site, where ${site.kept} stayed, and ${unit.rank_all} of ` +
      `${unit.of_all} among all ${site.kinds}${units.comparable ? "" : ", with scores divided by the mean of their site"}.`,
  ];
  if (site.learned !== null) {
    says.push(`Its rank from 0 (worst) to 1 (best) is ${figure(unit.share)}. The learned threshold of the site is ` +
      `${figure(site.learned)}, before the shift that all sites share.`);
  }
  if (unit.classes.length) {
    const names = unit.classes.slice(0, 3).map(([name, use]) => `${name} (${Math.round(use)})`).join(", ");
    says.push(`The classes that use it most are ${names}. The numbers are percentiles among all ${site.kinds}.`);
  }
  // Names of classes come from the user. textContent does not read them as HTML, as innerHTML would.
  document.getElementById("why-text").replaceChildren(...says.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
  document.getElementById("why-title").textContent =
    `Why ${site.kind} ${unit.unit} of ${site.name} ${unit.kept ? "stayed" : "was removed"}: it ranks ${unit.rank} of ${site.size} in its site`;
  document.getElementById("unit").value = String(index);
  for (const button of document.querySelectorAll("button[data-unit]")) {
    const chosen = Number(button.dataset.unit) === index;
    button.classList.toggle("chosen", chosen);
    button.setAttribute("aria-pressed", String(chosen));
  }
  const row = [...near].sort(([a], [b]) => a.score - b.score); // sorted, so that neighbouring labels get different heights and do not overlap
  const groups = [true, false].map((kept) => near.filter(([each]) => each.kept === kept));
  const lines = site.cut === null ? [] : [{
    type: "line", x0: site.cut, x1: site.cut, yref: "paper", y0: 0, y1: 0.5, line: { color: "#1c2733", width: 1.2, dash: "dot" },
  }];
  draw("why-scores", groups.map((group, i) => ({
    type: "scatter", mode: "markers", name: i ? "removed" : "kept", cliponaxis: false,
    x: group.map(([each]) => each.score), y: group.map(() => 0), text: group.map(([each]) => String(each.unit)),
    marker: {
      size: 14, color: i ? "#fff" : colours.kept,
      line: { width: 2, color: i ? colours.removed : colours.kept },
    },
    hovertemplate: `${site.kind} %{text}: score %{x:.3g}<extra>${i ? "removed" : "kept"}</extra>`,
  })).concat({
    type: "scatter", mode: "text", x: row.map(([each]) => each.score),
    y: row.map((_, i) => (i % 2 ? 1.75 : 1)), text: row.map(([each]) => String(each.unit)), showlegend: false, hoverinfo: "skip",
  }, {
    type: "scatter", mode: "markers", x: [unit.score], y: [0], showlegend: false, hoverinfo: "skip", cliponaxis: false,
    marker: { size: 24, symbol: "circle-open", color: "#1c2733", line: { width: 2 } },
  }), own({
    height: 165, shapes: lines, dragmode: false, margin: { l: 20, r: 20, t: 30, b: 44 },
    xaxis: { title: { text: "score" }, fixedrange: true, zeroline: false },
    yaxis: { visible: false, range: [-1, 2.3], fixedrange: true },
  }));
  if (unit.classes.length && document.getElementById("why-classes")) {
    const most = [...unit.classes].reverse();
    draw("why-classes", [{
      type: "bar", orientation: "h", x: most.map(([, use]) => use), y: most.map((_, i) => i),
      marker: { color: unit.kept ? colours.kept : colours.removed }, width: 0.62,
      hovertemplate: "%{x:.0f} of 100<extra></extra>",
    }], own({
      height: 90 + 25 * most.length, dragmode: false, margin: { ...layout.margin, t: 10 },
      xaxis: { title: { text: `percentile among all ${site.kinds}` }, range: [0, 100], fixedrange: true },
      yaxis: {
        automargin: true, fixedrange: true, tickvals: most.map((_, i) => i), ticktext: most.map(([name]) => escaped(name)),
      },
    }));
  }
}

// Prints the cell of a class map that the pointer is on as text below the map.
function readout(id, titles) {
  const place = document.getElementById(id), line = document.getElementById(id + "-readout");
  place.on("plotly_hover", ({ points: [point] }) => {
    const kept = point.data.name, cell = `${titles.rows[point.y]}, ${titles.columns[point.x]}`;
    line.textContent = `${cell}: ${kept}, percentile ${Math.round(point.z)}`;
  });
}

// Gives the browser time to react to the reader before the script continues.
const pause = () => new Promise((done) => setTimeout(done, 0));

// Connects the buttons and the list of units to the function `why`. Then draws all charts one after the other.
async function start() {
  if (units.units.length) {
    const choice = document.getElementById("unit");
    choice.addEventListener("change", () => why(Number(choice.value)));
    for (const button of document.querySelectorAll("button[data-unit]")) {
      button.addEventListener("click", () => {
        why(Number(button.dataset.unit));
        document.getElementById("why").scrollIntoView({ behavior: "smooth" });
      });
    }
    why(Number(choice.value));
  }
  performance.mark("opened");
  for (const [id, { data, layout: its }] of Object.entries(figures)) {
    await pause(); // so that the reader can use the page while the charts are drawn
    await draw(id, data, its);
    if (units.maps[id]) readout(id, units.maps[id]);
  }
  performance.mark("drawn");
  document.body.dataset.ready = "true";
}

// On the screen, charts have the width of the window. For printing, they get the width of the paper.
addEventListener("beforeprint", () => drawn.forEach((place) => Plotly.relayout(place, { width: PAPER })));
addEventListener("afterprint", () => drawn.forEach((place) => Plotly.relayout(place, { width: null, autosize: true })));
start();
