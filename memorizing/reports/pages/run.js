"use strict";
/* The report of a run. page.data comes from `gather_run` in report.py. */
(() => {
  const { element, number, table, data } = page;
  const { at, missing, options, interval, textOf, cacheName } = report;
  const training = data.training, steps = training.step ?? [];
  const evaluations = data.evaluations.map((each) => ({ ...each, text: textOf(each.figures), label: labelOf(each.figures) }));

  function labelOf(figures) {
    return `${textOf(figures)} · memory ${number(figures.memory_size)}${figures.xl_cache ? "" : " · no XL cache"}`;
  }

  // Main figures

  function tile(term, value, ...details) {
    at("headline").append(element("div", { class: "tile" }, element("dt", {}, term), element("dd", {}, value),
      details.filter(Boolean).map((detail) => element("dd", { class: "small" }, detail))));
  }

  function showHeadline() {
    const alike = evaluations.filter((evaluation) => evaluation.text === evaluations[0].text);  // other texts cannot be compared
    const best = alike.length && alike.reduce((a, b) => (a.figures.perplexity <= b.figures.perplexity ? a : b));
    if (best) {
      const { figures } = best;
      tile("Best held-out perplexity", number(figures.perplexity, 3), interval(figures.perplexity_interval, 3), best.label);
      tile("Bits per byte of that evaluation", number(figures.bits_per_byte, 4), `${number(figures.documents)} documents`);
      if (figures.gain) {
        tile("Gain from memory in that evaluation", number(figures.gain.nats_per_token, 3, true),
          "nats per token", interval(figures.gain.interval, 3, true), `against memory ${number(figures.gain.against_memory_size)}`);
      }
    }
    if (!steps.length) return;
    tile("Training loss", number(training.loss.at(-1), 3), "nats per token", `at step ${number(steps.at(-1))} of ${number(data.steps)}`);
    tile("Throughput", number(charts.median(training.tokens_per_second)), "tokens/s, median of training");
  }

  // Training

  const stepAxis = () => ({ title: "step", log: at("log-steps").checked, hoverformat: ",d" });

  function showCurve(parent, id, name, title, unit, settings = {}) {
    if (!training[name] || training[name].every((value) => value === null)) return;
    const draw = charts.add(at(parent), id, () => ({
      title: title(training[name]),
      traces: [{ x: steps, y: training[name], mode: "lines", line: { ...charts.line(0), width: 1.5 },
        hovertemplate: `step %{x:,}: %{y}<extra></extra>` }],
      layout: { x: stepAxis(), y: { title: unit, ...settings }, legend: false },
    }));
    charts.listen(["log-steps"], [draw]);
  }

  function showLoss() {
    const draw = charts.add(at("training-charts"), "loss-chart", () => {
      const perplexity = at("quantity").value === "perplexity", share = Number(at("smoothing").value);
      at("smoothing-value").textContent = number(share, 2);
      const asShown = (values) => (perplexity ? values.map((value) => (value === null ? null : Math.exp(value))) : values);
      const smooth = asShown(charts.smoothed(training.loss, share)), what = perplexity ? "perplexity" : "loss";
      const unit = perplexity ? "perplexity" : "loss, nats per token", { color } = charts.line(0);
      const digits = perplexity ? 1 : 2, hover = `step %{x:,}: %{y:.${digits + 1}f}`;
      return {
        title: `Training ${what}: from ${number(smooth[0], digits)} to ${number(smooth.at(-1), digits)}`,
        note: `Loss of new tokens, before the model learns from them.${share ? " The strong line is smoothed." : ""}`,
        traces: [
          ...(share ? [{ x: steps, y: asShown(training.loss), name: "as logged", mode: "lines", opacity: 0.5,
            line: { color, width: 1 }, hovertemplate: `${hover}<extra>as logged</extra>` }] : []),
          { x: steps, y: smooth, name: share ? "smoothed" : "as logged", mode: "lines", line: { color, width: 2 },
            hovertemplate: `${hover}<extra>${share ? "smoothed" : ""}</extra>` },
        ],
        layout: { x: stepAxis(), y: { title: unit, log: at("log-loss").checked }, legend: share > 0, height: 380 },
      };
    }, true);
    charts.listen(["quantity", "smoothing", "log-steps", "log-loss"], [draw]);
  }

  function showTraining() {
    if (!steps.length) return missing("training-charts", "No metrics yet: metrics.jsonl is empty.");
    showLoss();
    showCurve("training-charts", "learning-rate-chart", "learning_rate",
      (values) => `Learning rate, maximum ${values.reduce((a, b) => Math.max(a, b), 0).toPrecision(3)}`, "learning rate");
    showCurve("training-charts", "gradient-norm-chart", "gradient_norm",
      (values) => `Gradient norm, median ${number(charts.median(values), 2)}`, "norm, before clipping", { rangemode: "tozero" });
    showCurve("training-charts", "accuracy-chart", "accuracy",
      (values) => `Accuracy of the next token: ${number(100 * values.at(-1), 0)}% at the end`, "share of tokens", { tickformat: ".0%", rangemode: "tozero" });
  }

  // Memory

  function showGates(layer, names, source) {
    const last = names.map((name) => training[name].at(-1));
    const highest = last.indexOf(Math.max(...last));
    const draw = charts.add(at("memory-charts"), `${source}-${layer}-chart`, () => ({
      title: `Gates of layer ${layer}: head ${names[highest].split("_").at(-1)} takes most from memory, ${number(last[highest], 2)}`,
      note: "Share that each head takes from memory. The rest comes from the local context."
        + (source === "gate_value" ? " The gate depends on the token; this is the mean over tokens that found something." : ""),
      traces: names.map((name, i) => ({
        x: steps, y: training[name], name: `head ${name.split("_").at(-1)}`, mode: "lines", line: { ...charts.line(i), width: 2 },
        hovertemplate: `step %{x:,}: %{y:.3f}<extra>head ${name.split("_").at(-1)}</extra>`,
      })),
      layout: { x: stepAxis(), y: { title: "gate", range: [0, 1] } },
    }));
    charts.listen(["log-steps"], [draw]);
  }

  function showMemory() {
    const gates = Object.keys(training).map((name) => name.match(/^(gates|gate_value)\/layer_(\d+)(\/head_\d+)?$/)).filter(Boolean);
    for (const [name, , layer, head] of gates) {
      if (!head) {
        showCurve("memory-charts", `gates-${layer}-chart`, name,
          (values) => `Gate of layer ${layer}: ${number(values.at(-1), 2)} from memory at the end`, "gate", { range: [0, 1] });
      }
    }
    const headGates = gates.filter((match) => match[3]);
    for (const layer of new Set(headGates.map((match) => match[2]))) {
      const layerGates = headGates.filter((match) => match[2] === layer);
      showGates(layer, layerGates.map((match) => match[0]), layerGates[0][1]);
    }
    if (!gates.length) missing("memory-charts", "This run has no memory layers, or no metrics yet.");
    showCurve("memory-charts", "memory-fill-chart", "memory_fill",
      (values) => `Memory filled: ${number(100 * values.at(-1), 0)}% at the end`, "share of slots in use",
      { range: [0, 1.03], tickformat: ".0%" });
    const recalls = Object.keys(training).filter((name) => name.startsWith("recall/"));
    for (const name of recalls) {
      const layer = name.split("_").at(-1);
      showCurve("memory-charts", `recall-${layer}-chart`, name,
        (values) => `Recall of the search in layer ${layer}: median ${number(100 * charts.median(values), 1)}%`,
        "share of true neighbors found", { range: [0, 1.03], tickformat: ".0%" });
    }
    if (!recalls.length) {
      at("memory-charts").append(element("p", { class: "muted small wide" },
        "Training did not measure the recall of the search. Memory.report_recall = True turns that on."));
    }
  }

  // Evaluations

  function showEvaluationsTable() {
    const figure = (name) => (row) => row.figures[name];
    at("evaluations-table").append(table("All evaluations of held-out text, with 95% confidence intervals over documents", [
      { title: "Text", value: (row) => row.text },
      { title: "Memory", number: true, value: figure("memory_size"), text: (row) => number(row.figures.memory_size) },
      { title: "XL cache", value: (row) => (row.figures.xl_cache ? "yes" : "no") },
      { title: "Perplexity", number: true, value: figure("perplexity"), text: (row) => number(row.figures.perplexity, 3) },
      { title: "Interval", number: true, value: (row) => row.figures.perplexity_interval?.[0],
        text: (row) => interval(row.figures.perplexity_interval ?? [null], 3) },
      { title: "Bits per byte", number: true, value: figure("bits_per_byte"), text: (row) => number(row.figures.bits_per_byte, 4) },
      { title: "Gain, nats per token", number: true, value: (row) => row.figures.gain?.nats_per_token,
        text: (row) => number(row.figures.gain?.nats_per_token, 4, true), help: "over the smallest memory of the same evaluation" },
      { title: "Interval of gain", number: true, value: (row) => row.figures.gain?.interval[0],
        text: (row) => (row.figures.gain ? interval(row.figures.gain.interval, 4, true) : "–") },
      { title: "Accuracy", number: true, value: figure("accuracy"), text: (row) => `${number(100 * row.figures.accuracy, 1)}%` },
      { title: "Recall", number: true, value: figure("recall"),
        text: (row) => ("recall" in row.figures ? `${number(100 * row.figures.recall, 2)}%` : "–") },
      { title: "Documents", number: true, value: figure("documents"), text: (row) => number(row.figures.documents) },
      { title: "Tokens", number: true, value: figure("tokens"), text: (row) => number(row.figures.tokens) },
      { title: "Search", value: figure("search") },
      { title: "Step", number: true, value: figure("checkpoint_step"), text: (row) => number(row.figures.checkpoint_step) },
    ], evaluations));
  }

  const bySize = (rows) => [...rows].sort((a, b) => a.figures.memory_size - b.figures.memory_size);
  const chosen = (xl) => bySize(evaluations.filter((evaluation) => evaluation.text === at("text").value && evaluation.figures.xl_cache === xl));
  const isXl = () => at("xl").value === "with";
  const caches = () => [...new Set(evaluations.filter((evaluation) => evaluation.text === at("text").value).map((evaluation) => evaluation.figures.xl_cache))].sort().reverse();
  const perplexityAxis = () => ({ title: "perplexity", log: at("log-perplexity").checked });
  const positionAxis = () => ({ title: "position in the document, tokens", log: at("log-positions").checked });

  function showBySize() {
    return charts.add(at("evaluation-charts"), "size-chart", () => {
      const all = chosen(isXl());
      const [first, last] = [all[0], all.at(-1)].map((evaluation) => evaluation.figures);
      const sizes = [...new Set(caches().flatMap((xl) => chosen(xl)).map((evaluation) => evaluation.figures.memory_size))].sort((a, b) => a - b);
      return {
        title: all.length < 2 ? `Perplexity ${number(first.perplexity, 2)} at memory ${number(first.memory_size)}`
          : `Perplexity by memory: ${number(first.perplexity, 2)} at ${number(first.memory_size)}, ${number(last.perplexity, 2)} at ${number(last.memory_size)}`,
        note: "Bars: 95% confidence intervals over documents. Differences between memories are far more certain than these.",
        traces: caches().map((xl, i) => {
          const rows = chosen(xl), y = rows.map((evaluation) => evaluation.figures.perplexity);
          const reach = (end) => rows.map((evaluation) => {
            const value = evaluation.figures.perplexity_interval?.[end] ?? evaluation.figures.perplexity;
            return Math.abs(value - evaluation.figures.perplexity);
          });
          return { x: rows.map((evaluation) => number(evaluation.figures.memory_size)), y, name: cacheName(xl), mode: "lines+markers",
            line: { ...charts.line(i), width: 2 }, marker: { size: 8 },
            error_y: { type: "data", symmetric: false, array: reach(1), arrayminus: reach(0), thickness: 1, width: 4 },
            hovertemplate: `memory %{x}: %{y:.3f}<extra>${cacheName(xl)}</extra>` };
        }),
        layout: { x: { title: "memory, tokens", type: "category", categoryorder: "array", categoryarray: sizes.map((size) => number(size)) },
          y: perplexityAxis(), legend: caches().length > 1 },
      };
    });
  }

  /** Returns a line by position for each memory: no memory in gray, the others from pale to strong. */
  function byPosition(rows, values) {
    const others = rows.filter((evaluation) => evaluation.figures.memory_size > 0);
    return rows.map((row) => {
      const size = row.figures.memory_size, ranges = values(row.figures);
      const color = size ? charts.ramp(others.indexOf(row), others.length) : page.color("baseline");
      return { x: ranges.map((range) => charts.range(range).middle), y: ranges.map((range) => range.value), text: ranges.map((range) => charts.range(range).words),
        name: `memory ${number(size)}`, mode: "lines+markers", line: { color, width: 2, dash: size ? "solid" : "dash" }, marker: { size: 6, color },
        hovertemplate: `%{text}: %{y:.3f}<extra>memory ${number(size)}</extra>` };
    });
  }

  function showPositions() {
    return [
      charts.add(at("evaluation-charts"), "position-chart", () => ({
        title: `Perplexity by position in the document, ${cacheName(isXl())}`,
        note: "Only long documents have the later positions.",
        traces: byPosition(chosen(isXl()), (figures) => figures.perplexity_by_position.map((each) => ({ ...each, value: each.perplexity }))),
        layout: { x: positionAxis(), y: perplexityAxis() },
      })),
      charts.add(at("evaluation-charts"), "gain-chart", () => {
        const rows = chosen(isXl()).filter((evaluation) => evaluation.figures.gain);
        return rows.length ? {
          title: `Gain from memory by position, over memory ${number(rows[0].figures.gain.against_memory_size)}`,
          note: `Above zero, memory helps. ${cacheName(isXl())[0].toUpperCase()}${cacheName(isXl()).slice(1)}.`,
          traces: byPosition(rows, (figures) => figures.gain.by_position.map((each) => ({ ...each, value: each.nats_per_token }))),
          layout: { x: positionAxis(), y: { title: "gain, nats per token", zeroline: true, zerolinecolor: page.color("muted") } },
        } : null;
      }),
    ];
  }

  function showEvaluations() {
    if (!evaluations.length) {
      at("evaluation-controls").hidden = true;
      return missing("evaluations-table", "No evaluations yet. `memorizing evaluate --workdir=...` makes them.");
    }
    showEvaluationsTable();
    options("text", [...new Set(evaluations.map((evaluation) => evaluation.text))].map((text) => [text, text]));
    const chooseXl = () => options("xl", caches().map((xl) => [xl ? "with" : "without", xl ? "with" : "without"]));
    chooseXl();
    at("text").addEventListener("input", chooseXl);
    charts.listen(["text", "xl", "log-positions", "log-perplexity"], [showBySize(), ...showPositions()]);
  }

  // Documents

  function showDocuments() {
    const withDocuments = evaluations.filter((evaluation) => evaluation.documents?.length);
    if (!withDocuments.length) {
      at("document-controls").hidden = true;
      return missing("documents-table", "No evaluation with a table of documents (.csv) yet.");
    }
    options("evaluation", withDocuments.map((evaluation, i) => [i, evaluation.label]));
    const lastGain = withDocuments.findLastIndex((evaluation) => evaluation.figures.gain && evaluation.figures.xl_cache);
    at("evaluation").value = Math.max(lastGain, 0);
    const selected = () => withDocuments[Number(at("evaluation").value)];
    const perToken = (row) => (selected().figures.gain ? row.gain / row.tokens : null);
    const offer = () => options("document-quantity",
      [...(selected().figures.gain ? [["gain", "gain over the smallest memory"]] : []), ["perplexity", "perplexity"]]);
    offer();
    const draw = charts.add(at("document-charts"), "documents-chart", () => {
      const rows = selected().documents, isGain = at("document-quantity").value === "gain";
      const y = rows.map((row) => (isGain ? perToken(row) : row.perplexity));
      const better = y.filter((gain) => gain > 0).length;
      return {
        title: isGain ? `Memory helps in ${number(better)} of ${number(rows.length)} documents` : "Perplexity of each document, by its length",
        note: selected().label,
        traces: [{ x: rows.map((row) => row.tokens), y, text: rows.map((row) => charts.plain(row.name)), mode: "markers",
          marker: { color: page.color("series-1"), size: 9, opacity: 0.75 }, hovertemplate: "%{text}<br>%{x:,} tokens: %{y:.3f}<extra></extra>" }],
        layout: { x: { title: "length of the document, tokens", log: at("log-tokens").checked },
          y: isGain ? { title: "gain, nats per token", zeroline: true, zerolinecolor: page.color("muted") } : { title: "perplexity", log: true },
          legend: false },
      };
    }, true);
    const list = () => at("documents-table").replaceChildren(table(`Documents of ${selected().label}`, [
      { title: "Document", value: (row) => row.name },
      { title: "Tokens", number: true, value: (row) => row.tokens, text: (row) => number(row.tokens) },
      { title: "Bytes", number: true, value: (row) => row.bytes, text: (row) => number(row.bytes) },
      { title: "Perplexity", number: true, value: (row) => row.perplexity, text: (row) => number(row.perplexity, 3) },
      { title: "Bits per byte", number: true, value: (row) => row.bits_per_byte, text: (row) => number(row.bits_per_byte, 4) },
      { title: "Gain, nats per token", number: true, value: perToken, text: (row) => number(perToken(row), 4, true) },
    ], selected().documents, { tall: true, sorted: [1, "descending"] }));
    list();
    at("evaluation").addEventListener("input", offer);
    charts.listen(["evaluation"], [list]);
    charts.listen(["evaluation", "document-quantity", "log-tokens"], [draw]);
  }

  // Hardware and throughput

  const time = (text) => text.replace("T", " ").replace("+00:00", "");
  const minutes = (row) => (new Date(row.until) - new Date(row.started)) / 60000;

  function showHardware() {
    if (!data.hardware.length) missing("hardware-facts", "The folder has no hardware.json, so the hardware is unknown.");
    else {
      at("hardware-facts").append(table("Hardware of each training session", [
        { title: "Started, UTC", value: (row) => row.started, text: (row) => time(row.started) },
        { title: "Last saved", words: true, value: (row) => row.until, text: (row) => time(row.until) },
        { title: "Minutes", number: true, value: minutes, text: (row) => number(minutes(row), 1) },
        { title: "Steps", value: (row) => row.from_step, text: (row) => `${number(row.from_step)} to ${number(row.to_step)}` },
        { title: "Devices", value: (row) => `${row.devices} × ${row.device_kind}` },
        { title: "Processes", number: true, value: (row) => row.processes },
        { title: "Mesh", words: true, value: (row) => Object.entries(row.mesh ?? {}).map(([axis, size]) => `${axis} ${size}`).join(", ") },
        { title: "Host", words: true, value: (row) => `${row.host_cpus} cores, ${row.processor}` },
        { title: "Search", value: (row) => row.search ?? "–" },
        { title: "Versions", words: true, value: (row) => `jax ${row.jax}, Python ${row.python}, memorizing ${row.memorizing}` },
      ], data.hardware));
      at("hardware-facts").append(element("p", { class: "muted small" }, "Last saved: the time at which metrics were last saved."));
    }
    showCurve("hardware-charts", "throughput-chart", "tokens_per_second",
      (values) => `Throughput: median ${number(charts.median(values))} tokens/s`, "tokens/s", { rangemode: "tozero" });
    showCurve("hardware-charts", "utilization-chart", "model_flops_utilization",
      (values) => `Model FLOPs utilization: median ${number(100 * charts.median(values), 1)}%`, "share of the devices' peak",
      { tickformat: ".0%", rangemode: "tozero" });
    const timed = evaluations.filter((evaluation) => evaluation.figures.seconds);
    if (timed.length) {
      at("hardware-facts").append(table("Duration of each evaluation, compilation included", [
        { title: "Evaluation", value: (row) => row.label },
        { title: "Seconds", number: true, value: (row) => row.figures.seconds, text: (row) => number(row.figures.seconds, 1) },
        { title: "Tokens/s", number: true, value: (row) => row.figures.tokens / row.figures.seconds,
          text: (row) => number(row.figures.tokens / row.figures.seconds) },
      ], timed));
    }
  }

  report.showHeading();
  showHeadline();
  showTraining();
  showMemory();
  showEvaluations();
  showDocuments();
  showHardware();
  report.showSettings();
})();
