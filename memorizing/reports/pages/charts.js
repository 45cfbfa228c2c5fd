"use strict";
/* Plotly charts in the colors of the page. They are drawn again when the theme or a control changes. */
const charts = (() => {
  const drawn = [];
  const touch = matchMedia("(pointer: coarse)").matches;
  const SERIES = 8, DASHES = ["solid", "dash", "dot", "dashdot"];

  /** Escapes a text, because Plotly interprets some markup. */
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  /** Returns color and dash of the i-th line, for lines without an order. */
  const line = (i) => ({ color: page.color(`series-${(i % SERIES) + 1}`), dash: DASHES[Math.floor(i / SERIES) % 4] });

  /** Returns the color of the i-th of n ordered lines, from pale to strong. */
  function ramp(i, n) {
    const rgb = (name) => [1, 3, 5].map((at) => parseInt(page.color(name).slice(at, at + 2), 16));
    const [low, high] = [rgb("ramp-low"), rgb("ramp-high")], share = n > 1 ? i / (n - 1) : 1;
    const mixed = low.map((from, at) => Math.round(from + share * (high[at] - from)));
    return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  }

  /** Returns the settings of an axis. A logarithmic one has ticks at powers of ten, or more if `values` span few of these. */
  function axis({ title, log, ...others }, values) {
    const positive = values.filter((value) => value > 0);
    const least = positive.reduce((a, b) => Math.min(a, b), Infinity), most = positive.reduce((a, b) => Math.max(a, b), 0);
    return {
      title: { text: title, standoff: 10 }, automargin: true, zeroline: false, exponentformat: "none", separatethousands: true,
      gridcolor: page.color("grid"), linecolor: page.color("line"), tickcolor: page.color("line"), fixedrange: touch,
      ...(log ? { type: "log", ...(most / least > 30 ? { dtick: 1 } : { minorloglabels: "complete" }) } : {}), ...others,
    };
  }

  /** Returns the height of a legend beyond its first line, in a chart of this width. */
  function legendHeight(traces, width) {
    const names = traces.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => trace.name.length);
    const across = Math.max(Math.floor(width / (60 + 7 * Math.max(...names, 0))), 1);
    return 18 * Math.max(Math.ceil(names.length / across) - 1, 0);
  }

  function layout({ x, y, legend = true, height = 320, ...others }, traces, width) {
    return {
      autosize: true, height: height + (legend ? legendHeight(traces, width) : 0), margin: { l: 8, r: 24, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: page.color("sans"), size: 13, color: page.color("text") },
      xaxis: axis(x, traces.flatMap((trace) => trace.x)), yaxis: axis(y, traces.flatMap((trace) => trace.y)), dragmode: touch ? false : "zoom", separators: ".,",
      showlegend: legend, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal", font: { size: 12 } },
      hoverlabel: { bgcolor: page.color("panel"), bordercolor: page.color("muted"), font: { color: page.color("text") } },
      hovermode: "closest", ...others,
    };
  }

  /** Adds a figure to `parent`. `describe()` returns {title, note, traces, layout}, or null to hide the figure. */
  function add(parent, id, describe, wide = false) {
    const heading = page.element("h3"), note = page.element("p", { class: "muted small" });
    const box = page.element("div", { class: "chart", id, role: "img" });
    const figure = page.element("figure", { class: wide ? "panel wide" : "panel" },
      page.element("figcaption", {}, heading, note), box);
    parent.append(figure);
    function draw() {
      const described = describe();
      figure.hidden = !described;
      if (!described) return;
      heading.textContent = described.title;
      note.textContent = described.note ?? "";
      note.hidden = !described.note;
      box.setAttribute("aria-label", `Chart: ${described.title}. ${described.note ?? ""}`);
      Plotly.react(box, described.traces, layout(described.layout, described.traces, box.clientWidth), { responsive: true, displayModeBar: false });
    }
    drawn.push(draw);
    draw();
    return draw;
  }

  page.onTheme(() => drawn.forEach((draw) => draw()));

  /** Returns the median of the values that are not missing. */
  function median(values) {
    const sorted = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b), half = sorted.length >> 1;
    if (!sorted.length) return null;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }

  /** Returns the exponential moving average with bias correction; `share` is the weight of the average at each step. */
  function smoothed(values, share) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return null;
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  /** Returns the middle of a range of `perplexity_by_position`, and its name. The first range has 128 tokens; ranges double. */
  function range({ first_token: first }) {
    const end = first ? 2 * first : 128;
    return { middle: (first + end) / 2, words: `tokens ${page.number(first)} to ${page.number(end - 1)}` };
  }

  /** Calls the draw functions when one of these controls changes. */
  function listen(ids, draws) {
    for (const id of ids) document.getElementById(id).addEventListener("input", () => draws.forEach((draw) => draw()));
  }

  return { add, line, ramp, plain, median, smoothed, range, listen };
})();
