"use strict";
/* The report of a run: page.data is what report.py gathered of its workdir. */
(() => {
  const { element, number, table, data } = page;
  const { at, missing, options, interval, textOf, inWords } = parts;
  const training = data.training, steps = training.step ?? [];
  const evaluations = data.evaluations.map((each) => ({ ...each, text: textOf(each.figures), label: labelOf(each.figures) }));

  function labelOf(figures) {
    return `${textOf(figures)} · memory ${number(figures.memory_size)}${figures.xl_cache ? "" : " · no XL cache"}`;
  }

  // Headline

  function tile(term, value, ...details) {
    at("headline").append(element("div", { class: "tile" }, element("dt", {}, term), element("dd", {}, value),
      details.filter(Boolean).map((detail) => element("dd", { class: "small" }, detail))));
  }

  function showHeadline() {
    const alike = evaluations.filter((it) => it.text === evaluations[0].text);  // only these can be compared
    const best = alike.length && alike.reduce((a, b) => (a.figures.perplexity <= b.figures.perplexity ? a : b));
    if (best) {
      const { figures } = best;
      tile("Best held-out perplexity", number(figures.perplexity, 3), interval(figures.perplexity_interval, 3), best.label);
      tile("Bits per byte there", number(figures.bits_per_byte, 4), `${number(figures.documents)} documents`);
      if (figures.gain) {
        tile("Gained by memory there", number(figures.gain.nats_per_token, 3, true),
          "nats a token", interval(figures.gain.interval, 3, true), `against memory ${number(figures.gain.against_memory_size)}`);
      }
    }
    if (!steps.length) return;
    tile("Training loss", number(training.loss.at(-1), 3), "nats a token", `at step ${number(steps.at(-1))} of ${number(data.steps)}`);
    tile("Throughput", number(charts.median(training.tokens_per_second)), "tokens/s, median of training");
  }

  // Training

  const stepAxis = () => ({ title: "step", log: at("log-steps").checked, hoverformat: ",d" });

  function showCurve(parent, id, name, title, unit, settings = {}) {
    if (!training[name] || training[name].every((it) => it === null)) return;
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
      const of = (values) => (perplexity ? values.map((it) => (it === null ? null : Math.exp(it))) : values);
      const smooth = of(charts.smoothed(training.loss, share)), what = perplexity ? "perplexity" : "loss";
      const unit = perplexity ? "perplexity" : "loss, nats a token", { color } = charts.line(0);
      const digits = perplexity ? 1 : 2, hover = `step %{x:,}: %{y:.${digits + 1}f}`;
      return {
        title: `Training ${what}: from ${number(smooth[0], digits)} to ${number(smooth.at(-1), digits)}`,
        note: `Of the tokens read, before the model learned from them.${share ? " The strong line is smoothed." : ""}`,
        traces: [
          ...(share ? [{ x: steps, y: of(training.loss), name: "as logged", mode: "lines", opacity: 0.5,
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
    if (!steps.length) return missing("training-charts", "No metrics yet: metrics.jsonl has no line.");
    showLoss();
    showCurve("training-charts", "learning-rate-chart", "learning_rate",
      (it) => `Learning rate, at most ${it.reduce((a, b) => Math.max(a, b), 0).toPrecision(3)}`, "learning rate");
    showCurve("training-charts", "gradient-norm-chart", "gradient_norm",
      (it) => `Gradient norm, ${number(charts.median(it), 2)} in the median`, "norm, before clipping", { rangemode: "tozero" });
    showCurve("training-charts", "accuracy-chart", "accuracy",
      (it) => `Next token right: ${number(100 * it.at(-1), 0)}% at the end`, "share of tokens", { tickformat: ".0%", rangemode: "tozero" });
  }

  // Memory

  function showGates(layer, names, source) {
    const last = names.map((name) => training[name].at(-1));
    const highest = last.indexOf(Math.max(...last));
    const draw = charts.add(at("memory-charts"), `${source}-${layer}-chart`, () => ({
      title: `Gates of layer ${layer}: head ${names[highest].split("_").at(-1)} reads most from memory, ${number(last[highest], 2)}`,
      note: "Share that each head takes from memory; the rest comes from the local context."
        + (source === "openness" ? " It depends on the token: the mean over those that found something." : ""),
      traces: names.map((name, i) => ({
        x: steps, y: training[name], name: `head ${name.split("_").at(-1)}`, mode: "lines", line: { ...charts.line(i), width: 2 },
        hovertemplate: `step %{x:,}: %{y:.3f}<extra>head ${name.split("_").at(-1)}</extra>`,
      })),
      layout: { x: stepAxis(), y: { title: "gate", range: [0, 1] } },
    }));
    charts.listen(["log-steps"], [draw]);
  }

  function showMemory() {
    const gates = Object.keys(training).map((name) => name.match(/^(gates|openness)\/layer_(\d+)(\/head_\d+)?$/)).filter(Boolean);
    for (const [name, , layer, head] of gates) {
      if (!head) {
        showCurve("memory-charts", `gates-${layer}-chart`, name,
          (it) => `Gate of layer ${layer}: ${number(it.at(-1), 2)} from memory at the end`, "gate", { range: [0, 1] });
      }
    }
    const ofHeads = gates.filter((it) => it[3]);
    for (const layer of new Set(ofHeads.map((it) => it[2]))) {
      const own = ofHeads.filter((it) => it[2] === layer);
      showGates(layer, own.map((it) => it[0]), own[0][1]);
    }
    if (!gates.length) missing("memory-charts", "This run has no memory layers, or no metrics yet.");
    showCurve("memory-charts", "memory-fill-chart", "memory_fill",
      (it) => `Memory filled: ${number(100 * it.at(-1), 0)}% at the end`, "share of slots in use",
      { range: [0, 1.03], tickformat: ".0%" });
    const recalls = Object.keys(training).filter((name) => name.startsWith("recall/"));
    for (const name of recalls) {
      const layer = name.split("_").at(-1);
      showCurve("memory-charts", `recall-${layer}-chart`, name,
        (it) => `Recall of the search in layer ${layer}: ${number(100 * charts.median(it), 1)}% in the median`,
        "share of true neighbors found", { range: [0, 1.03], tickformat: ".0%" });
    }
    if (!recalls.length) {
      at("memory-charts").append(element("p", { class: "muted small wide" },
        "Recall of the search was not measured in training: Memory.report_recall = True does."));
    }
  }

  // Evaluations

  function showEvaluationsTable() {
    const of = (name) => (row) => row.figures[name];
    at("evaluations-table").append(table("Every reading of held-out text, with 95% intervals over documents", [
      { title: "Text", value: (row) => row.text },
      { title: "Memory", number: true, value: of("memory_size"), text: (row) => number(row.figures.memory_size) },
      { title: "XL cache", value: (row) => (row.figures.xl_cache ? "yes" : "no") },
      { title: "Perplexity", number: true, value: of("perplexity"), text: (row) => number(row.figures.perplexity, 3) },
      { title: "Interval", number: true, value: (row) => row.figures.perplexity_interval?.[0],
        text: (row) => interval(row.figures.perplexity_interval ?? [null], 3) },
      { title: "Bits per byte", number: true, value: of("bits_per_byte"), text: (row) => number(row.figures.bits_per_byte, 4) },
      { title: "Gain, nats a token", number: true, value: (row) => row.figures.gain?.nats_per_token,
        text: (row) => number(row.figures.gain?.nats_per_token, 4, true), help: "over the smallest memory evaluated with it" },
      { title: "Gain's interval", number: true, value: (row) => row.figures.gain?.interval[0],
        text: (row) => (row.figures.gain ? interval(row.figures.gain.interval, 4, true) : "–") },
      { title: "Accuracy", number: true, value: of("accuracy"), text: (row) => `${number(100 * row.figures.accuracy, 1)}%` },
      { title: "Recall", number: true, value: of("recall"),
        text: (row) => ("recall" in row.figures ? `${number(100 * row.figures.recall, 2)}%` : "–") },
      { title: "Documents", number: true, value: of("documents"), text: (row) => number(row.figures.documents) },
      { title: "Tokens", number: true, value: of("tokens"), text: (row) => number(row.figures.tokens) },
      { title: "Search", value: of("search") },
      { title: "Step", number: true, value: of("checkpoint_step"), text: (row) => number(row.figures.checkpoint_step) },
    ], evaluations));
  }

  const bySize = (rows) => [...rows].sort((a, b) => a.figures.memory_size - b.figures.memory_size);
  const chosen = (xl) => bySize(evaluations.filter((it) => it.text === at("text").value && it.figures.xl_cache === xl));
  const isXl = () => at("xl").value === "with";
  const caches = () => [...new Set(evaluations.filter((it) => it.text === at("text").value).map((it) => it.figures.xl_cache))].sort().reverse();
  const perplexityAxis = () => ({ title: "perplexity", log: at("log-perplexity").checked });
  const positionAxis = () => ({ title: "position in the document, tokens", log: at("log-positions").checked });

  function showBySize() {
    return charts.add(at("evaluation-charts"), "size-chart", () => {
      const all = chosen(isXl());
      const [first, last] = [all[0], all.at(-1)].map((it) => it.figures);
      const sizes = [...new Set(caches().flatMap((xl) => chosen(xl)).map((it) => it.figures.memory_size))].sort((a, b) => a - b);
      return {
        title: all.length < 2 ? `Perplexity ${number(first.perplexity, 2)} at memory ${number(first.memory_size)}`
          : `Perplexity by memory: ${number(first.perplexity, 2)} at ${number(first.memory_size)}, ${number(last.perplexity, 2)} at ${number(last.memory_size)}`,
        note: "Bars: 95% intervals over documents, of which the differences between memories are far surer.",
        traces: caches().map((xl, i) => {
          const rows = chosen(xl), y = rows.map((it) => it.figures.perplexity);
          const reach = (end) => rows.map((it) => {
            const value = it.figures.perplexity_interval?.[end] ?? it.figures.perplexity;
            return Math.abs(value - it.figures.perplexity);
          });
          return { x: rows.map((it) => number(it.figures.memory_size)), y, name: inWords(xl), mode: "lines+markers",
            line: { ...charts.line(i), width: 2 }, marker: { size: 8 },
            error_y: { type: "data", symmetric: false, array: reach(1), arrayminus: reach(0), thickness: 1, width: 4 },
            hovertemplate: `memory %{x}: %{y:.3f}<extra>${inWords(xl)}</extra>` };
        }),
        layout: { x: { title: "memory, tokens", type: "category", categoryorder: "array", categoryarray: sizes.map((it) => number(it)) },
          y: perplexityAxis(), legend: caches().length > 1 },
      };
    });
  }

  /** Lines by position, one a memory: the smallest grey, the others from pale to strong. */
  function byPosition(rows, values) {
    const others = rows.filter((it) => it.figures.memory_size > 0);
    return rows.map((row) => {
      const size = row.figures.memory_size, places = values(row.figures);
      const color = size ? charts.ramp(others.indexOf(row), others.length) : page.color("baseline");
      return { x: places.map((it) => charts.place(it).middle), y: places.map((it) => it.value), text: places.map((it) => charts.place(it).words),
        name: `memory ${number(size)}`, mode: "lines+markers", line: { color, width: 2, dash: size ? "solid" : "dash" }, marker: { size: 6, color },
        hovertemplate: `%{text}: %{y:.3f}<extra>memory ${number(size)}</extra>` };
    });
  }

  function showPositions() {
    return [
      charts.add(at("evaluation-charts"), "position-chart", () => ({
        title: `Perplexity by position in the document, ${inWords(isXl())}`,
        note: "Later places are those of long documents only.",
        traces: byPosition(chosen(isXl()), (it) => it.perplexity_by_position.map((each) => ({ ...each, value: each.perplexity }))),
        layout: { x: positionAxis(), y: perplexityAxis() },
      })),
      charts.add(at("evaluation-charts"), "gain-chart", () => {
        const rows = chosen(isXl()).filter((it) => it.figures.gain);
        return rows.length ? {
          title: `What memory gains by position, against memory ${number(rows[0].figures.gain.against_memory_size)}`,
          note: `Above zero, a memory helps. ${inWords(isXl())[0].toUpperCase()}${inWords(isXl()).slice(1)}.`,
          traces: byPosition(rows, (it) => it.gain.by_position.map((each) => ({ ...each, value: each.nats_per_token }))),
          layout: { x: positionAxis(), y: { title: "gain, nats a token", zeroline: true, zerolinecolor: page.color("muted") } },
        } : null;
      }),
    ];
  }

  function showEvaluations() {
    if (!evaluations.length) {
      at("evaluation-controls").hidden = true;
      return missing("evaluations-table", "No evaluations yet: `memorizing evaluate --workdir=...` makes them.");
    }
    showEvaluationsTable();
    options("text", [...new Set(evaluations.map((it) => it.text))].map((text) => [text, text]));
    const chooseXl = () => options("xl", caches().map((xl) => [xl ? "with" : "without", xl ? "with" : "without"]));
    chooseXl();
    at("text").addEventListener("input", chooseXl);
    charts.listen(["text", "xl", "log-positions", "log-perplexity"], [showBySize(), ...showPositions()]);
  }

  // Documents

  function showDocuments() {
    const readings = evaluations.filter((it) => it.documents?.length);
    if (!readings.length) {
      at("document-controls").hidden = true;
      return missing("documents-table", "No table of documents (.csv) lies beside an evaluation yet.");
    }
    options("reading", readings.map((it, i) => [i, it.label]));
    const gaining = readings.findLastIndex((it) => it.figures.gain && it.figures.xl_cache);
    at("reading").value = Math.max(gaining, 0);
    const reading = () => readings[Number(at("reading").value)];
    const perToken = (row) => (reading().figures.gain ? row.gain / row.tokens : null);
    const offer = () => options("document-quantity",
      [...(reading().figures.gain ? [["gain", "gain over the smallest memory"]] : []), ["perplexity", "perplexity"]]);
    offer();
    const draw = charts.add(at("document-charts"), "documents-chart", () => {
      const rows = reading().documents, isGain = at("document-quantity").value === "gain";
      const y = rows.map((row) => (isGain ? perToken(row) : row.perplexity));
      const better = y.filter((it) => it > 0).length;
      return {
        title: isGain ? `Memory helps in ${number(better)} of ${number(rows.length)} documents` : "Perplexity of each document, by its length",
        note: reading().label,
        traces: [{ x: rows.map((row) => row.tokens), y, text: rows.map((row) => charts.plain(row.name)), mode: "markers",
          marker: { color: page.color("series-1"), size: 9, opacity: 0.75 }, hovertemplate: "%{text}<br>%{x:,} tokens: %{y:.3f}<extra></extra>" }],
        layout: { x: { title: "length of the document, tokens", log: at("log-tokens").checked },
          y: isGain ? { title: "gain, nats a token", zeroline: true, zerolinecolor: page.color("muted") } : { title: "perplexity", log: true },
          legend: false },
      };
    }, true);
    const list = () => at("documents-table").replaceChildren(table(`Documents of ${reading().label}`, [
      { title: "Document", value: (row) => row.name },
      { title: "Tokens", number: true, value: (row) => row.tokens, text: (row) => number(row.tokens) },
      { title: "Bytes", number: true, value: (row) => row.bytes, text: (row) => number(row.bytes) },
      { title: "Perplexity", number: true, value: (row) => row.perplexity, text: (row) => number(row.perplexity, 3) },
      { title: "Bits per byte", number: true, value: (row) => row.bits_per_byte, text: (row) => number(row.bits_per_byte, 4) },
      { title: "Gain, nats a token", number: true, value: perToken, text: (row) => number(perToken(row), 4, true) },
    ], reading().documents, { tall: true, sorted: [1, "descending"] }));
    list();
    at("reading").addEventListener("input", offer);
    charts.listen(["reading"], [list]);
    charts.listen(["reading", "document-quantity", "log-tokens"], [draw]);
  }

  // Hardware and throughput

  const time = (text) => text.replace("T", " ").replace("+00:00", "");
  const minutes = (row) => (new Date(row.until) - new Date(row.started)) / 60000;

  function showHardware() {
    if (!data.hardware.length) missing("hardware-facts", "hardware.json is not in the workdir: this run is older than that record.");
    else {
      at("hardware-facts").append(table("Each time that training started, and on what", [
        { title: "Started, UTC", value: (row) => row.started, text: (row) => time(row.started) },
        { title: "Until", words: true, value: (row) => row.until, text: (row) => time(row.until) },
        { title: "Minutes", number: true, value: minutes, text: (row) => number(minutes(row), 1) },
        { title: "Steps", value: (row) => row.from_step, text: (row) => `${number(row.from_step)} to ${number(row.to_step)}` },
        { title: "Devices", value: (row) => `${row.devices} × ${row.device_kind}` },
        { title: "Processes", number: true, value: (row) => row.processes },
        { title: "Mesh", words: true, value: (row) => Object.entries(row.mesh ?? {}).map(([axis, size]) => `${axis} ${size}`).join(", ") },
        { title: "Host", words: true, value: (row) => `${row.host_cpus} cores, ${row.processor}` },
        { title: "Search", value: (row) => row.search ?? "–" },
        { title: "Versions", words: true, value: (row) => `jax ${row.jax}, Python ${row.python}, memorizing ${row.memorizing}` },
      ], data.hardware));
      at("hardware-facts").append(element("p", { class: "muted small" }, "Until: when metrics were last saved."));
    }
    showCurve("hardware-charts", "throughput-chart", "tokens_per_second",
      (it) => `Throughput: ${number(charts.median(it))} tokens/s in the median`, "tokens/s", { rangemode: "tozero" });
    showCurve("hardware-charts", "utilization-chart", "model_flops_utilization",
      (it) => `Model FLOPs utilization: ${number(100 * charts.median(it), 1)}% in the median`, "share of the devices' peak",
      { tickformat: ".0%", rangemode: "tozero" });
    const timed = evaluations.filter((it) => it.figures.seconds);
    if (timed.length) {
      at("hardware-facts").append(table("How long each evaluation took, compilation included", [
        { title: "Reading", value: (row) => row.label },
        { title: "Seconds", number: true, value: (row) => row.figures.seconds, text: (row) => number(row.figures.seconds, 1) },
        { title: "Tokens/s", number: true, value: (row) => row.figures.tokens / row.figures.seconds,
          text: (row) => number(row.figures.tokens / row.figures.seconds) },
      ], timed));
    }
  }

  parts.showHeading();
  showHeadline();
  showTraining();
  showMemory();
  showEvaluations();
  showDocuments();
  showHardware();
  parts.showSettings();
})();
