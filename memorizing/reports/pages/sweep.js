"use strict";
/* The report of a sweep: page.data is what report.py gathered of its folder. Seeds are drawn as a mean and a band. */
(() => {
  const { element, number, table, data } = page;
  const { at, missing, options, interval, textOf, inWords } = parts;
  const MEMORY = ["MEMORY_SIZE", "Memory.size"], CONTEXT = ["SEGMENT_LENGTH", "Batch.segment_length"];
  const XL = ["Model.xl_cache"], DATA = ["DATA", "Training.data"];
  const names = Object.keys(data.over);
  const readings = data.points.flatMap((point) =>
    point.evaluations.map((figures) => ({ point, figures, text: textOf({ ...figures, name: "" }), isOwn: figures.memory_size === trainedWith(point) })));

  function trainedWith(point) {
    return MEMORY.map((name) => point.values[name]).find((it) => it !== undefined) ?? data.memory_size;
  }

  const shown = (value) => (typeof value === "number" && Number.isInteger(value) ? number(value) : String(value));
  const called = (values) => Object.entries(values).map(([name, value]) => `${name} ${shown(value)}`).join(", ") || "all points";
  const isNumeric = (name) => data.over[name].every((it) => typeof it === "number");
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

  /** The swept settings that the columns of context, memory, XL cache and text do not show already. */
  function columnsOfTheirOwn() {
    const isShown = (name) => CONTEXT.includes(name)
      || (MEMORY.includes(name) && readings.every((it) => it.isOwn))
      || (XL.includes(name) && readings.every((it) => it.figures.xl_cache === it.point.values[name]))
      || (DATA.includes(name) && grouped(readings, (it) => it.text).every((alike) => grouped(alike, (it) => it.point.values[name]).length === 1));
    return names.filter((name) => !isShown(name));
  }

  function showResults() {
    if (!readings.length) return missing("results-table", "No point has been evaluated yet.");
    const own = columnsOfTheirOwn(), first = (row) => row[0];
    const rows = grouped(readings, ({ point, figures }) =>
      [own.map((name) => point.values[name]), figures.segment_length, figures.memory_size, figures.xl_cache]);
    const of = (row, text) => row.filter((it) => it.text === text).map((it) => it.figures.perplexity);
    at("results-table").append(table("Perplexity of held-out text: mean over seeds [least, most]", [
      ...own.map((name) => ({ title: `Trained with ${name}`, number: isNumeric(name),
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

  /** Which settings tell groups of points apart; and names and colors of the groups' lines by these. */
  function told(groups) {
    const differ = names.filter((name) => new Set(groups.map((values) => JSON.stringify(values[name]))).size > 1);
    const hasOrder = differ.length === 1 && isNumeric(differ[0]);
    return {
      name: (values) => called(Object.fromEntries((differ.length ? differ : Object.keys(values)).map((name) => [name, values[name]]))),
      color: (i) => (hasOrder ? charts.ramp(i, groups.length) : charts.line(i).color),
    };
  }

  /** A line through the means over seeds at each x, on a band from the least to the most. `cells`: {x, values, words, reach?}.
      Of a single seed, `reach` is drawn: the 95% interval over documents. */
  function lineOf(name, cells, color, mode = "lines+markers") {
    const x = cells.map((it) => it.x), has = cells.some((it) => it.values.length > 1);
    const edge = (values) => ({ x, y: values, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false });
    return [
      ...(has ? [edge(cells.map((it) => ends(it.values)[0])),
        { ...edge(cells.map((it) => ends(it.values)[1])), fill: "tonexty", fillcolor: `${color}33` }] : []),
      { x, y: cells.map((it) => mean(it.values)), error_y: has || !cells[0].reach?.every(Number.isFinite) ? undefined : {
        type: "data", symmetric: false, thickness: 1, width: 4, array: cells.map((it) => it.reach[1] - it.values[0]),
        arrayminus: cells.map((it) => it.values[0] - it.reach[0]) }, name: charts.plain(name), mode, line: { color, width: 2 }, marker: { size: 7, color },
        text: cells.map((it) => `${it.words}${it.values.length > 1 ? `, ${it.values.length} seeds` : ""}`),
        hovertemplate: "%{text}: %{y:.3f}<extra>%{fullData.name}</extra>" },
    ];
  }

  const bySeeds = data.seeds.length > 1 ? "Means over seeds; bands from the least to the most." : "";
  const spread = bySeeds || "Bars: 95% intervals over documents.";
  const perplexityAxis = () => ({ title: "perplexity", log: at("log-perplexity").checked });

  function showBySize() {
    return charts.add(at("curve-charts"), "size-chart", () => {
      const rows = chosen().filter((it) => it.isOwn || !isOwn());
      if (!rows.length) return null;
      const sizes = [...new Set(rows.map((it) => it.figures.memory_size))].sort((a, b) => a - b);
      const best = rows.reduce((a, b) => (a.figures.perplexity <= b.figures.perplexity ? a : b)).figures;
      const valuesOf = ({ point }) => (isOwn() ? without(point.values, MEMORY) : point.values);
      const lines = grouped(rows, valuesOf), { name, color } = told(lines.map((line) => valuesOf(line[0])));
      return {
        title: `Perplexity against memory: least, ${number(best.perplexity, 2)}, at ${number(best.memory_size)}`,
        note: [isOwn() ? "Each point read with the memory it was trained with." : "Each point read with several memories.", spread].join(" "),
        traces: lines.flatMap((line, i) => lineOf(
          name(valuesOf(line[0])),
          grouped(line, (it) => it.figures.memory_size).sort((a, b) => a[0].figures.memory_size - b[0].figures.memory_size).map((cell) => ({
            x: number(cell[0].figures.memory_size), values: cell.map((it) => it.figures.perplexity),
            reach: cell[0].figures.perplexity_interval, words: `memory ${number(cell[0].figures.memory_size)}` })),
          lines.length > 1 ? color(i) : charts.line(0).color)),
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
      const { name, color } = told(lines.map((line) => line[0].point.values));
      return {
        title: `Perplexity by position in the document, ${inWords(at("xl").value === "with")}`,
        note: `Later places are those of long documents only. ${bySeeds}`,
        traces: lines.flatMap((line, i) => {
          const places = grouped(line.flatMap((it) => it.figures.perplexity_by_position), (it) => it.first_token);
          const memory = isOwn() ? "" : `, read with ${number(line[0].figures.memory_size)}`;
          return lineOf(name(line[0].point.values) + memory, places.map((cell) => ({ x: charts.place(cell[0]).middle, values: cell.map((it) => it.perplexity),
            words: charts.place(cell[0]).words })), isOwn() ? color(i) : charts.line(i).color);
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
      const lines = grouped(trained, (point) => point.values), { name, color } = told(lines.map((line) => line[0].values));
      return {
        title: "Training loss by step",
        note: `${share ? "Smoothed. " : ""}${bySeeds}`,
        traces: lines.flatMap((points, i) => {
          const all = points.flatMap((point) => {
            const losses = charts.smoothed(point.training.map((it) => it.loss), share);
            return point.training.map((it, at) => ({ step: it.step, loss: losses[at] }));
          });
          const cells = grouped(all.filter((it) => it.loss !== null), (it) => it.step);
          return lineOf(name(points[0].values), cells.map((cell) => ({ x: cell[0].step, values: cell.map((it) => it.loss),
            words: `step ${number(cell[0].step)}` })), color(i), "lines");
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
    if (bySteps) charts.listen(["smoothing", "log-steps"], [bySteps]);
    at("curve-controls").hidden = !readings.length && !bySteps;
  }

  // Points

  /** A name that may go on in the next line behind each comma. */
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
      ["Seeds", data.seeds.map((it) => it ?? "–").join(", ")], ["Command", data.command]];
    at("grid").append(...facts.flatMap(([term, value]) => [element("dt", {}, term), element("dd", { class: "mono" }, value)]));
  }

  parts.showHeading();
  showResults();
  showCurves();
  showPoints();
  showGrid();
  parts.showSettings();
})();
