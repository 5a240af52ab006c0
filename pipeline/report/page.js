"use strict";
// Draws each <div class="chart" data-figure="ID"> from the JSON in <script id="ID">, in the page's colours.
const COLOURS = ["#4c86e0", "#e0803c", "#3fa66b", "#c95a9b", "#8d6fd1", "#b59a2c", "#3ba7b5", "#d0605e", "#7f8a96",
  "#96b03c", "#5f6fd8", "#c98a5a"];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const json = (id) => JSON.parse(document.getElementById(id).textContent);
const escaped = (text) => text.replace(/[&<>]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[letter]);
const CONFIG = { displayModeBar: false, responsive: true };

function themed(layout) {
  const axis = { gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line"),
    tickfont: { size: 11 }, automargin: true, fixedrange: true };
  const title = (own) => (own && own.title ? { title: { standoff: 6, font: { size: 11 }, ...own.title } } : {});
  const margin = { l: 44, r: 12, t: 8, b: 34 };
  return { margin, dragmode: false, hovermode: "closest", colorway: COLOURS, ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--text"), size: 12 },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--text") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, ...layout.legend },
    xaxis: { ...axis, ...layout.xaxis, ...title(layout.xaxis) }, yaxis: { ...axis, ...layout.yaxis, ...title(layout.yaxis) } };
}

function coloured(data, runs) {
  const kinds = { in: style("--accent"), rejected: style("--bad"), kept: style("--good") };
  return data.map((trace) => {
    const own = { ...trace };
    if (own.kinds) own.marker = { color: own.kinds.map((kind) => kinds[kind]) };
    if (own.run) own.line = { ...own.line, color: COLOURS[runs.indexOf(own.run) % COLOURS.length] };
    if ("like" in own) own.line = { ...own.line, color: COLOURS[own.like % COLOURS.length] };
    delete own.kinds; delete own.run; delete own.like;
    return own;
  });
}

function drawCharts() {
  const runs = json("run-names");
  for (const chart of document.querySelectorAll("[data-figure]")) {
    const figure = json(chart.dataset.figure);
    Plotly.react(chart, coloured(figure.data, runs), themed(figure.layout), CONFIG);
  }
}

// The map: a point a record, coloured by cluster or by source; what is searched for stands out.
function drawMap(chart) {
  const map = json(chart.dataset.map), panel = chart.closest("figure");
  const query = panel.querySelector("input"), by = panel.querySelector("select"), count = panel.querySelector("output");
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hit = map.points.map((point) => words.every((word) => point.search.includes(word)));
  const names = by.value === "source" ? map.sources : map.clusters;
  const groups = names.map(() => []);
  map.points.forEach((point, row) => groups[by.value === "source" ? point.source : point.cluster].push(row));
  const traces = groups.map((rows, group) => ({
    type: "scatter", mode: "markers", name: escaped(names[group]),
    x: rows.map((row) => map.points[row].x), y: rows.map((row) => map.points[row].y),
    text: rows.map((row) => map.points[row].hover), hovertemplate: "%{text}<extra></extra>",
    marker: { size: rows.map((row) => (words.length && hit[row] ? 9 : 5)), color: COLOURS[group % COLOURS.length],
      symbol: group < COLOURS.length ? "circle" : "diamond",
      opacity: rows.map((row) => (words.length && !hit[row] ? 0.07 : 0.8)), line: { width: 0 } },
  })).filter((trace) => trace.x.length);
  const labels = map.clusters.map((name, group) => ({ ...map.centres[group], text: escaped(name), showarrow: false,
    font: { size: 11, color: style("--text") }, bgcolor: style("--card"), opacity: 0.82, borderpad: 2 }));
  const narrow = chart.clientWidth < 600;
  const hidden = { visible: false, fixedrange: false };
  const layout = themed({ xaxis: { ...hidden, range: [-0.02, 1.02] }, yaxis: { ...hidden, range: [-0.02, 1.02] },
    margin: { l: 0, r: 0, t: 0, b: 0 }, dragmode: "pan", annotations: words.length || narrow ? [] : labels,
    showlegend: !narrow || names.length < 7, legend: { orientation: "h", y: -0.01, yanchor: "top", bgcolor: "rgba(0,0,0,0)" } });
  Plotly.react(chart, traces, layout, { ...CONFIG, scrollZoom: true });
  count.textContent = words.length ? `${hit.filter(Boolean).length} of ${map.points.length} match` : "";
}

function start() {
  const maps = document.querySelectorAll("[data-map]");
  const draw = () => { drawCharts(); maps.forEach(drawMap); };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  for (const chart of maps) {
    let waiting = 0;
    const later = () => { clearTimeout(waiting); waiting = setTimeout(() => drawMap(chart), 200); };
    chart.closest("figure").querySelector("input").addEventListener("input", later);
    chart.closest("figure").querySelector("select").addEventListener("change", later);
  }
  document.documentElement.dataset.drawn = "yes";
}

start();
