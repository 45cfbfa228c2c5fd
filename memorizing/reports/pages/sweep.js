"use strict";
/* The report of a sweep. page.data comes from `gather_sweep` in report.py. Seeds are drawn as a mean and a band. */
(() => {
  const { element, number, table, data } = page;
  const { at, missing, options, interval, textOf, cacheName } = report;
  const MEMORY = ["MEMORY_SIZE", "Memory.size"], CONTEXT = ["SEGMENT_LENGTH", "Batch.segment_length"];
  const XL = ["Model.xl_cache"], DATA = ["DATA", "Training.data"];
  const names = Object.keys(data.over);
  const evaluations = data.points.flatMap((point) =>
    point.evaluations.map((figures) => ({ point, figures, text: textOf({ ...figures, name: "" }), isTrainedSize: figures.memory_size === trainedWith(point) })));

  function trainedWith(point) {
    return MEMORY.map((name) => point.values[name]).find((value) => value !== undefined) ?? data.memory_size;
  }

  const shown = (value) => (typeof value === "number" && Number.isInteger(value) ? number(value) : String(value));
  const called = (values) => Object.entries(values).map(([name, value]) => `${name} ${shown(value)}`).join(", ") || "all points";
  const isNumeric = (name) => data.over[name].every((value) => typeof value === "number");
  const without = (values, left) => Object.fromEntries(Object.entries(values).filter(([name]) => !left.includes(name)));

  /** Groups rows by key, in the order of the keys' first appearance. */
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

  /** Returns the swept settings that no column of the results shows: context, memory, XL cache or text. */
  function extraColumns() {
    const isShown = (name) => CONTEXT.includes(name)
      || (MEMORY.includes(name) && evaluations.every((evaluation) => evaluation.isTrainedSize))
      || (XL.includes(name) && evaluations.every((evaluation) => evaluation.figures.xl_cache === evaluation.point.values[name]))
      || (DATA.includes(name) && grouped(evaluations, (evaluation) => evaluation.text).every((alike) => grouped(alike, (evaluation) => evaluation.point.values[name]).length === 1));
    return names.filter((name) => !isShown(name));
  }

  function showResults() {
    if (!evaluations.length) return missing("results-table", "No point has been evaluated yet.");
    const extra = extraColumns(), first = (row) => row[0];
    const rows = grouped(evaluations, ({ point, figures }) =>
      [extra.map((name) => point.values[name]), figures.segment_length, figures.memory_size, figures.xl_cache]);
    const perplexities = (row, text) => row.filter((evaluation) => evaluation.text === text).map((evaluation) => evaluation.figures.perplexity);
    at("results-table").append(table("Perplexity of held-out text: mean over seeds [minimum, maximum]", [
      ...extra.map((name) => ({ title: `Trained with ${name}`, number: isNumeric(name),
        value: (row) => first(row).point.values[name], text: (row) => shown(first(row).point.values[name]) })),
      { title: "Context", number: true, value: (row) => first(row).figures.segment_length, text: (row) => number(first(row).figures.segment_length) },
      { title: "Memory", number: true, value: (row) => first(row).figures.memory_size, text: (row) => number(first(row).figures.memory_size) },
      { title: "XL cache", value: (row) => (first(row).figures.xl_cache ? "yes" : "no") },
      ...[...new Set(evaluations.map((evaluation) => evaluation.text))].map((text) => ({ title: text, number: true,
        value: (row) => (perplexities(row, text).length ? mean(perplexities(row, text)) : null),
        text: (row) => {
          const values = perplexities(row, text);
          return values.length ? number(mean(values), 3) + (values.length > 1 ? ` ${interval(ends(values), 3)}` : "") : "–";
        } })),
      { title: "Seeds", number: true, value: (row) => new Set(row.map((evaluation) => evaluation.point.seed)).size },
    ], rows));
  }

  // Curves

  const chosen = () => evaluations.filter((evaluation) => evaluation.text === at("text").value && evaluation.figures.xl_cache === (at("xl").value === "with"));
  const onlyTrained = () => at("memories").value === "trained";

  /** Returns names and colors for the lines of groups of points, by the settings in which the groups differ. */
  function lineStyles(groups) {
    const differ = names.filter((name) => new Set(groups.map((values) => JSON.stringify(values[name]))).size > 1);
    const hasOrder = differ.length === 1 && isNumeric(differ[0]);
    return {
      name: (values) => called(Object.fromEntries((differ.length ? differ : Object.keys(values)).map((name) => [name, values[name]]))),
      color: (i) => (hasOrder ? charts.ramp(i, groups.length) : charts.line(i).color),
    };
  }

  /** Returns a line through the means over seeds, on a band from minimum to maximum. `cells`: {x, values, words, reach?}.
      For a single seed it draws `reach`, the 95% confidence interval over documents, instead. */
  function lineOf(name, cells, color, mode = "lines+markers") {
    const x = cells.map((cell) => cell.x), has = cells.some((cell) => cell.values.length > 1);
    const edge = (values) => ({ x, y: values, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false });
    return [
      ...(has ? [edge(cells.map((cell) => ends(cell.values)[0])),
        { ...edge(cells.map((cell) => ends(cell.values)[1])), fill: "tonexty", fillcolor: `${color}33` }] : []),
      { x, y: cells.map((cell) => mean(cell.values)), error_y: has || !cells[0].reach?.every(Number.isFinite) ? undefined : {
        type: "data", symmetric: false, thickness: 1, width: 4, array: cells.map((cell) => cell.reach[1] - cell.values[0]),
        arrayminus: cells.map((cell) => cell.values[0] - cell.reach[0]) }, name: charts.plain(name), mode, line: { color, width: 2 }, marker: { size: 7, color },
        text: cells.map((cell) => `${cell.words}${cell.values.length > 1 ? `, ${cell.values.length} seeds` : ""}`),
        hovertemplate: "%{text}: %{y:.3f}<extra>%{fullData.name}</extra>" },
    ];
  }

  const bySeeds = data.seeds.length > 1 ? "Lines: means over seeds. Bands: minimum to maximum." : "";
  const spread = bySeeds || "Bars: 95% confidence intervals over documents.";
  const perplexityAxis = () => ({ title: "perplexity", log: at("log-perplexity").checked });

  function showBySize() {
    return charts.add(at("curve-charts"), "size-chart", () => {
      const rows = chosen().filter((evaluation) => evaluation.isTrainedSize || !onlyTrained());
      if (!rows.length) return null;
      const sizes = [...new Set(rows.map((evaluation) => evaluation.figures.memory_size))].sort((a, b) => a - b);
      const best = rows.reduce((a, b) => (a.figures.perplexity <= b.figures.perplexity ? a : b)).figures;
      const valuesOf = ({ point }) => (onlyTrained() ? without(point.values, MEMORY) : point.values);
      const lines = grouped(rows, valuesOf), { name, color } = lineStyles(lines.map((line) => valuesOf(line[0])));
      return {
        title: `Perplexity by memory: lowest ${number(best.perplexity, 2)} at ${number(best.memory_size)}`,
        note: [onlyTrained() ? "Each point with the memory size of its training." : "Each point with several memory sizes.", spread].join(" "),
        traces: lines.flatMap((line, i) => lineOf(
          name(valuesOf(line[0])),
          grouped(line, (evaluation) => evaluation.figures.memory_size).sort((a, b) => a[0].figures.memory_size - b[0].figures.memory_size).map((cell) => ({
            x: number(cell[0].figures.memory_size), values: cell.map((evaluation) => evaluation.figures.perplexity),
            reach: cell[0].figures.perplexity_interval, words: `memory ${number(cell[0].figures.memory_size)}` })),
          lines.length > 1 ? color(i) : charts.line(0).color)),
        layout: { x: { title: "memory, tokens", type: "category", categoryorder: "array", categoryarray: sizes.map((size) => number(size)) },
          y: perplexityAxis(), legend: lines.length > 1 },
      };
    });
  }

  function showByPosition() {
    return charts.add(at("curve-charts"), "position-chart", () => {
      const rows = chosen().filter((evaluation) => evaluation.isTrainedSize || !onlyTrained());
      if (!rows.length) return null;
      const lines = grouped(rows, ({ point, figures }) => [point.values, onlyTrained() ? null : figures.memory_size]);
      const { name, color } = lineStyles(lines.map((line) => line[0].point.values));
      return {
        title: `Perplexity by position in the document, ${cacheName(at("xl").value === "with")}`,
        note: `Only long documents have the later positions. ${bySeeds}`,
        traces: lines.flatMap((line, i) => {
          const ranges = grouped(line.flatMap((evaluation) => evaluation.figures.perplexity_by_position), (range) => range.first_token);
          const memory = onlyTrained() ? "" : `, memory ${number(line[0].figures.memory_size)}`;
          return lineOf(name(line[0].point.values) + memory, ranges.map((cell) => ({ x: charts.range(cell[0]).middle, values: cell.map((range) => range.perplexity),
            words: charts.range(cell[0]).words })), onlyTrained() ? color(i) : charts.line(i).color);
        }),
        layout: { x: { title: "position in the document, tokens", log: at("log-positions").checked }, y: perplexityAxis() },
      };
    });
  }

  function showBySteps() {
    const trained = data.points.filter((point) => point.training.length);
    if (!trained.length) return missing("curve-charts", "No point has been trained yet.");
    return charts.add(at("curve-charts"), "training-chart", () => {
      const share = Number(at("smoothing").value);
      at("smoothing-value").textContent = number(share, 2);
      const lines = grouped(trained, (point) => point.values), { name, color } = lineStyles(lines.map((line) => line[0].values));
      return {
        title: "Training loss by step",
        note: `${share ? "Smoothed. " : ""}${bySeeds}`,
        traces: lines.flatMap((points, i) => {
          const all = points.flatMap((point) => {
            const losses = charts.smoothed(point.training.map((line) => line.loss), share);
            return point.training.map((line, at) => ({ step: line.step, loss: losses[at] }));
          });
          const cells = grouped(all.filter((entry) => entry.loss !== null), (entry) => entry.step);
          return lineOf(name(points[0].values), cells.map((cell) => ({ x: cell[0].step, values: cell.map((entry) => entry.loss),
            words: `step ${number(cell[0].step)}` })), color(i), "lines");
        }),
        layout: { x: { title: "step", log: at("log-steps").checked }, y: { title: "loss, nats per token" }, height: 380 },
      };
    }, true);
  }

  function showCurves() {
    options("text", [...new Set(evaluations.map((evaluation) => evaluation.text))].map((text) => [text, text]));
    options("xl", [...new Set(evaluations.map((evaluation) => evaluation.figures.xl_cache))].sort().reverse().map((xl) => (xl ? ["with", "with"] : ["without", "without"])));
    if (!evaluations.some((evaluation) => evaluation.isTrainedSize)) at("memories").value = "any";
    if (evaluations.length) {
      charts.listen(["text", "xl", "memories", "log-positions", "log-perplexity"], [showBySize(), showByPosition()]);
    }
    const bySteps = showBySteps();
    if (bySteps) charts.listen(["smoothing", "log-steps"], [bySteps]);
    at("curve-controls").hidden = !evaluations.length && !bySteps;
  }

  // Points

  /** Returns a name that may wrap after each comma. */
  const breakable = (name) => name.split(/(?<=,)/).flatMap((part) => [part, element("wbr")]);

  function showPoints() {
    const colors = { done: "good", failed: "bad", waiting: "warn" };
    at("points-table").append(table(`The grid: ${number(data.points.length)} points`, [
      { title: "Point", value: (row) => row.name, text: (row) => element(row.link ? "a" : "span", { href: row.link }, breakable(row.name)) },
      ...names.map((name) => ({ title: name, number: isNumeric(name),
        value: (row) => row.values[name], text: (row) => shown(row.values[name]) })),
      { title: "Seed", number: true, value: (row) => row.seed },
      { title: "Status", value: (row) => row.status, text: (row) => element("strong", { class: colors[row.status] }, row.status) },
      { title: "Last step", number: true, value: (row) => row.training.at(-1)?.step, text: (row) => number(row.training.at(-1)?.step) },
      { title: "Training loss", number: true, value: (row) => row.training.at(-1)?.loss, text: (row) => number(row.training.at(-1)?.loss, 3) },
      { title: "Training, s", number: true, value: (row) => row.seconds?.train, text: (row) => number(row.seconds?.train || null, 0) },
      { title: "Evaluation, s", number: true, value: (row) => row.seconds?.evaluate, text: (row) => number(row.seconds?.evaluate || null, 0) },
      { title: "Error", words: true, value: (row) => row.error, text: (row) => row.error ?? "–" },
    ], data.points));
  }

  function showGrid() {
    const facts = [...names.map((name) => [name, data.over[name].map(shown).join(", ")]),
      ["Seeds", data.seeds.map((value) => value ?? "–").join(", ")], ["Command", data.command]];
    at("grid").append(...facts.flatMap(([term, value]) => [element("dt", {}, term), element("dd", { class: "mono" }, value)]));
  }

  report.showHeading();
  showResults();
  showCurves();
  showPoints();
  showGrid();
  report.showSettings();
})();
