"use strict";
/* Charts by Plotly in the colors of the page, drawn again when these or a control change. */
const charts = (() => {
  const drawn = [];
  const touch = matchMedia("(pointer: coarse)").matches;
  const SERIES = 8, DASHES = ["solid", "dash", "dot", "dashdot"];

  /** Text that Plotly, which takes some markup for its own, shows as it is. */
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  /** Color and dash of the i-th of several things without an order. */
  const line = (i) => ({ color: page.color(`series-${(i % SERIES) + 1}`), dash: DASHES[Math.floor(i / SERIES) % 4] });

  /** Color of the i-th of n things that have an order, from pale to strong. */
  function ramp(i, n) {
    const rgb = (name) => [1, 3, 5].map((at) => parseInt(page.color(name).slice(at, at + 2), 16));
    const [low, high] = [rgb("ramp-low"), rgb("ramp-high")], share = n > 1 ? i / (n - 1) : 1;
    const mixed = low.map((from, at) => Math.round(from + share * (high[at] - from)));
    return `#${mixed.map((it) => it.toString(16).padStart(2, "0")).join("")}`;
  }

  /** Settings of an axis along `values`; a logarithmic one is labelled at powers of ten, or more often within a few. */
  function axis({ title, log, ...others }, values) {
    const positive = values.filter((it) => it > 0);
    const least = positive.reduce((a, b) => Math.min(a, b), Infinity), most = positive.reduce((a, b) => Math.max(a, b), 0);
    return {
      title: { text: title, standoff: 10 }, automargin: true, zeroline: false, exponentformat: "none", separatethousands: true,
      gridcolor: page.color("grid"), linecolor: page.color("line"), tickcolor: page.color("line"), fixedrange: touch,
      ...(log ? { type: "log", ...(most / least > 30 ? { dtick: 1 } : { minorloglabels: "complete" }) } : {}), ...others,
    };
  }

  /** Height that a legend takes beyond its first line, in a chart so wide. */
  function legendHeight(traces, width) {
    const names = traces.filter((it) => it.name && it.showlegend !== false).map((it) => it.name.length);
    const across = Math.max(Math.floor(width / (60 + 7 * Math.max(...names, 0))), 1);
    return 18 * Math.max(Math.ceil(names.length / across) - 1, 0);
  }

  function layout({ x, y, legend = true, height = 320, ...others }, traces, width) {
    return {
      autosize: true, height: height + (legend ? legendHeight(traces, width) : 0), margin: { l: 8, r: 24, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: page.color("sans"), size: 13, color: page.color("text") },
      xaxis: axis(x, traces.flatMap((it) => it.x)), yaxis: axis(y, traces.flatMap((it) => it.y)), dragmode: touch ? false : "zoom", separators: ".,",
      showlegend: legend, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal", font: { size: 12 } },
      hoverlabel: { bgcolor: page.color("panel"), bordercolor: page.color("muted"), font: { color: page.color("text") } },
      hovermode: "closest", ...others,
    };
  }

  /** A figure in `parent`; `describe()` gives {title, note, traces, layout}, or null while there is nothing to show. */
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

  /** The middle of values, those that are none left out. */
  function median(values) {
    const sorted = values.filter((it) => it !== null && it !== undefined).sort((a, b) => a - b), half = sorted.length >> 1;
    if (!sorted.length) return null;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }

  /** Exponential moving average that gives its first values their due weight; `share` is what it keeps at each step. */
  function smoothed(values, share) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return null;
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  /** A place of `perplexity_by_position`: its middle, and in words. Places double, the first holds 128 tokens. */
  function place({ first_token: first }) {
    const end = first ? 2 * first : 128;
    return { middle: (first + end) / 2, words: `tokens ${page.number(first)} to ${page.number(end - 1)}` };
  }

  /** Draws again when one of these controls changes. */
  function listen(ids, draws) {
    for (const id of ids) document.getElementById(id).addEventListener("input", () => draws.forEach((draw) => draw()));
  }

  return { add, line, ramp, plain, median, smoothed, place, listen };
})();
