"use strict";
/* The report of a sweep: page.data is what report.py gathered of its folder. Seeds are drawn as a mean and a band. */
(() => {
  const { element, number, table, data } = page;
  const { at, missing, options, interval, textOf, inWords } = parts;
  const MEMORY = ["MEMORY_SIZE", "Memory.size"];
  const names = Object.keys(data.over);
  const readings = data.points.flatMap((point) =>
    point.evaluations.map((figures) => ({ point, figures, text: textOf(figures), isOwn: figures.memory_size === trainedWith(point) })));

  function trainedWith(point) {
    return MEMORY.map((name) => point.values[name]).find((it) => it !== undefined) ?? data.memory_size;
  }

  const shown = (value) => (typeof value === "number" && Number.isInteger(value) ? number(value) : String(value));
  const called = (values) => Object.entries(values).map(([name, value]) => `${name} ${shown(value)}`).join(", ") || "all points";
  const without = (values, left) => Object.fromEntries(Object.entries(values).filter(([name]) => !left.includes(name)));

  /** Lists of those that have the same key, in the order in which keys are first met. */
  function grouped(rows, keyOf) {
    const groups = new Map();
    for (const row of rows) {
      const key = JSON.stringify(keyOf(row));
      groups.set(key, [...(groups.get(key) ?? []), row]);
    }
    return [...groups.values()];
  }

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const ends = (values) => [Math.min(...values), Math.max(...values)];

  // Results

  function showResults() {
    if (!readings.length) return missing("results-table", "No point has been evaluated yet.");
    const others = without(data.over, MEMORY);
    const rows = grouped(readings, ({ point, figures }) => [point.values, figures.segment_length, figures.memory_size, figures.xl_cache]);
    const first = (row) => row[0];
    const of = (row, text) => row.filter((it) => it.text === text).map((it) => it.figures.perplexity);
    at("results-table").append(table("Perplexity of held-out text: mean over seeds [least, most]; trained as the first columns say", [
      ...(names.length > Object.keys(others).length ? [
        { title: "Trained with memory", number: true, value: (row) => trainedWith(first(row).point), text: (row) => number(trainedWith(first(row).point)) }] : []),
      ...Object.keys(others).map((name) => ({ title: name, number: others[name].every((it) => typeof it === "number"),
        value: (row) => first(row).point.values[name], text: (row) => shown(first(row).point.values[name]) })),
      { title: "Context", number: true, value: (row) => first(row).figures.segment_length, text: (row) => number(first(row).figures.segment_length) },
      { title: "Memory", number: true, value: (row) => first(row).figures.memory_size, text: (row) => number(first(row).figures.memory_size) },
      { title: "XL cache", value: (row) => (first(row).figures.xl_cache ? "yes" : "no") },
      ...[...new Set(readings.map((it) => it.text))].map((text) => ({ title: text, number: true,
        value: (row) => (of(row, text).length ? mean(of(row, text)) : null),
        text: (row) => {
          const values = of(row, text);
          return values.length ? number(mean(values), 3) + (values.length > 1 ? ` ${interval(ends(values), 3)}` : "") : "–";
        } })),
      { title: "Seeds", number: true, value: (row) => new Set(row.map((it) => it.point.seed)).size },
    ], rows));
  }

  // Curves

  const chosen = () => readings.filter((it) => it.text === at("text").value && it.figures.xl_cache === (at("xl").value === "with"));
  const isOwn = () => at("memories").value === "own";

  /** Colour of the i-th of n lines: pale to strong where only one number differs, else one of several. */
  function colourOf(i, n) {
    const hasOrder = names.length === 1 && data.over[names[0]].every((it) => typeof it === "number");
    return hasOrder && isOwn() ? charts.ramp(i, n) : charts.line(i).color;
  }

  /** A line through the means over seeds at each x, on a band from the least to the most. `cells`: {x, values, words}. */
  function lineOf(name, cells, color, mode = "lines+markers") {
    const x = cells.map((it) => it.x), has = cells.some((it) => it.values.length > 1);
    const edge = (values) => ({ x, y: values, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false });
    return [
      ...(has ? [edge(cells.map((it) => ends(it.values)[0])),
        { ...edge(cells.map((it) => ends(it.values)[1])), fill: "tonexty", fillcolor: `${color}33` }] : []),
      { x, y: cells.map((it) => mean(it.values)), name: charts.plain(name), mode, line: { color, width: 2 }, marker: { size: 7, color },
        text: cells.map((it) => `${it.words}${it.values.length > 1 ? `, ${it.values.length} seeds` : ""}`),
        hovertemplate: "%{text}: %{y:.3f}<extra>%{fullData.name}</extra>" },
    ];
  }

  const bySeeds = data.seeds.length > 1 ? "Means over seeds; bands from the least to the most." : "";
  const perplexityAxis = () => ({ title: "perplexity", log: at("log-perplexity").checked });

  function showBySize() {
    return charts.add(at("curve-charts"), "size-chart", () => {
      const rows = chosen().filter((it) => it.isOwn || !isOwn());
      if (!rows.length) return null;
      const sizes = [...new Set(rows.map((it) => it.figures.memory_size))].sort((a, b) => a - b);
      const best = rows.reduce((a, b) => (a.figures.perplexity <= b.figures.perplexity ? a : b)).figures;
      const lines = grouped(rows, ({ point }) => (isOwn() ? without(point.values, MEMORY) : point.values));
      return {
        title: `Perplexity against memory: least, ${number(best.perplexity, 2)}, at ${number(best.memory_size)}`,
        note: [isOwn() ? "Each point read with the memory it was trained with." : "Each point read with several memories.", bySeeds].join(" "),
        traces: lines.flatMap((line, i) => lineOf(
          called(isOwn() ? without(line[0].point.values, MEMORY) : line[0].point.values),
          grouped(line, (it) => it.figures.memory_size).sort((a, b) => a[0].figures.memory_size - b[0].figures.memory_size).map((cell) => ({
            x: number(cell[0].figures.memory_size), values: cell.map((it) => it.figures.perplexity),
            words: `memory ${number(cell[0].figures.memory_size)}` })),
          charts.line(i).color)),
        layout: { x: { title: "memory, tokens", type: "category", categoryorder: "array", categoryarray: sizes.map((it) => number(it)) },
          y: perplexityAxis(), legend: lines.length > 1 },
      };
    });
  }

  function showByPosition() {
    return charts.add(at("curve-charts"), "position-chart", () => {
      const rows = chosen().filter((it) => it.isOwn || !isOwn());
      if (!rows.length) return null;
      const lines = grouped(rows, ({ point, figures }) => [point.values, isOwn() ? null : figures.memory_size]);
      return {
        title: `Perplexity by position in the document, ${inWords(at("xl").value === "with")}`,
        note: `Later places are those of long documents only. ${bySeeds}`,
        traces: lines.flatMap((line, i) => {
          const places = grouped(line.flatMap((it) => it.figures.perplexity_by_position), (it) => it.first_token);
          const name = called(line[0].point.values) + (isOwn() ? "" : `, read with ${number(line[0].figures.memory_size)}`);
          return lineOf(name, places.map((cell) => ({ x: charts.place(cell[0]).middle, values: cell.map((it) => it.perplexity),
            words: charts.place(cell[0]).words })), colourOf(i, lines.length));
        }),
        layout: { x: { title: "position in the document, tokens", log: at("log-positions").checked }, y: perplexityAxis() },
      };
    });
  }

  function showBySteps() {
    const trained = data.points.filter((it) => it.training.length);
    if (!trained.length) return missing("curve-charts", "No point has been trained yet.");
    return charts.add(at("curve-charts"), "training-chart", () => {
      const share = Number(at("smoothing").value);
      at("smoothing-value").textContent = number(share, 2);
      const lines = grouped(trained, (point) => point.values);
      return {
        title: "Training loss by step",
        note: `${share ? "Smoothed. " : ""}${bySeeds}`,
        traces: lines.flatMap((points, i) => {
          const all = points.flatMap((point) => {
            const losses = charts.smoothed(point.training.map((it) => it.loss), share);
            return point.training.map((it, at) => ({ step: it.step, loss: losses[at] }));
          });
          const cells = grouped(all.filter((it) => it.loss !== null), (it) => it.step);
          return lineOf(called(points[0].values), cells.map((cell) => ({ x: cell[0].step, values: cell.map((it) => it.loss),
            words: `step ${number(cell[0].step)}` })), colourOf(i, lines.length), "lines");
        }),
        layout: { x: { title: "step", log: at("log-steps").checked }, y: { title: "loss, nats a token" }, height: 380 },
      };
    }, true);
  }

  function showCurves() {
    options("text", [...new Set(readings.map((it) => it.text))].map((text) => [text, text]));
    options("xl", [...new Set(readings.map((it) => it.figures.xl_cache))].sort().reverse().map((xl) => (xl ? ["with", "with"] : ["without", "without"])));
    if (!readings.some((it) => it.isOwn)) at("memories").value = "any";
    if (readings.length) {
      charts.listen(["text", "xl", "memories", "log-positions", "log-perplexity"], [showBySize(), showByPosition()]);
    }
    const bySteps = showBySteps();
    if (bySteps) charts.listen(["smoothing", "log-steps", "memories"], [bySteps]);
    at("curve-controls").hidden = !readings.length && !bySteps;
  }

  // Points

  function showPoints() {
    const colours = { done: "good", failed: "bad", waiting: "warn" };
    at("points-table").append(table(`The grid: ${number(data.points.length)} points`, [
      { title: "Point", value: (row) => row.name, text: (row) => (row.link ? element("a", { href: row.link }, row.name) : row.name) },
      ...names.map((name) => ({ title: name, number: data.over[name].every((it) => typeof it === "number"),
        value: (row) => row.values[name], text: (row) => shown(row.values[name]) })),
      { title: "Seed", number: true, value: (row) => row.seed },
      { title: "Status", value: (row) => row.status, text: (row) => element("strong", { class: colours[row.status] }, row.status) },
      { title: "Last step", number: true, value: (row) => row.training.at(-1)?.step, text: (row) => number(row.training.at(-1)?.step) },
      { title: "Training loss", number: true, value: (row) => row.training.at(-1)?.loss, text: (row) => number(row.training.at(-1)?.loss, 3) },
      { title: "Training, s", number: true, value: (row) => row.seconds?.train, text: (row) => number(row.seconds?.train, 0) },
      { title: "Evaluation, s", number: true, value: (row) => row.seconds?.evaluate, text: (row) => number(row.seconds?.evaluate, 0) },
      { title: "Error", words: true, value: (row) => row.error, text: (row) => row.error ?? "–" },
    ], data.points));
  }

  function showGrid() {
    const facts = [...names.map((name) => [name, data.over[name].map(shown).join(", ")]),
      ["Seeds", data.seeds.map(String).join(", ")], ["Command", ["memorizing", "sweep", ...data.arguments].join(" ")]];
    at("grid").append(...facts.flatMap(([term, value]) => [element("dt", {}, term), element("dd", { class: "mono" }, value)]));
  }

  parts.showHeading();
  showResults();
  showCurves();
  showPoints();
  showGrid();
  parts.showSettings();
})();
