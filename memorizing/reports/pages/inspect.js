// The page of `memorizing inspect`: the document, with tokens colored by their gain; the selected token, with what each
// head retrieved for it; figures over the whole document. `data` comes from `_page_data` in inspection_page.py.
{

const NOWHERE = -2;
const { data, element, number } = page;
const floats = (text) => new Float32Array(bytes(text).buffer);
const gains = floats(data.gains), nats = floats(data.nats), correct = bytes(data.correct);
const places = new Int32Array(bytes(data.places).buffer), scores = floats(data.scores), weights = floats(data.weights), gates = floats(data.gates);
const [SHOWN, LAYERS, HEADS, TOP] = data.shape;
const { first, stop, context } = data.about;
let selected = null;

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const signed = (value, digits = 2) => number(value, digits, true);
const count = (value) => number(value);
// Makes white space visible.
const visible = (text) => text.replaceAll("\n", "\u21b5\n").replaceAll("\t", "\u21e5\t");

// The text, in blocks that the browser renders only when they are in view. A block ends at a line end if possible.

const BLOCK = 400, LONGEST = 2000; // tokens
const starts = [0]; // of blocks
data.texts.forEach((text, place) => {
  const length = place + 1 - starts.at(-1);
  if ((length >= BLOCK && text.endsWith("\n")) || length >= LONGEST) starts.push(place + 1);
});

function blockOf(from, to) {
  const block = element("span", { class: "block" });
  for (let place = from; place < to; place++) {
    const token = element("span", { "data-place": place }, data.texts[place]);
    if (data.texts[place].includes("\n")) token.className = "line-end";
    block.append(token);
  }
  return block;
}

const text = element("div", { id: "text", tabindex: 0, role: "textbox", "aria-readonly": "true", "aria-multiline": "true",
  "aria-label": "The document. Arrow keys move the selection from token to token." });
starts.forEach((from, number) => text.append(blockOf(from, starts[number + 1] ?? data.texts.length)));
const tokenAt = (place) => text.querySelector(`[data-place="${place}"]`);

/** Scrolls the text, not the page, to center a token; if `onlyIfHidden`, only when the token is out of view. */
function show(token, onlyIfHidden = false) {
  const place = token.getBoundingClientRect(), box = text.getBoundingClientRect();
  if (onlyIfHidden && place.top >= box.top && place.bottom <= box.bottom) return;
  text.scrollTop += place.top - box.top - box.height / 2;
}

function color() {
  const by = document.getElementById("color").value, scale = Number(document.getElementById("scale").value);
  for (const block of text.children) {
    for (const token of block.children) {
      const place = Number(token.dataset.place);
      const value = by === "gain" ? gains[place] : by === "loss" ? -nats[place] : 0;
      const alpha = Math.min(Math.abs(value) / scale, 1) * 0.75;
      token.style.background = alpha < 0.03 ? "" : `rgb(var(${value > 0 ? "--gained" : "--lost"}) / ${alpha.toFixed(2)})`;
    }
  }
}

// The selected token.

function retrieved(place) {
  const found = [];
  if (place < first || place >= stop) return found;
  for (let layer = 0; layer < LAYERS; layer++) {
    for (let head = 0; head < HEADS; head++) {
      const at = (((place - first) * LAYERS + layer) * HEADS + head) * TOP;
      const best = [];
      for (let rank = 0; rank < TOP; rank++) {
        if (places[at + rank] === NOWHERE) continue;
        best.push({ place: places[at + rank], score: scores[at + rank], weight: weights[at + rank] });
      }
      found.push({ layer, head, gate: gates[((place - first) * LAYERS + layer) * HEADS + head], best });
    }
  }
  return found;
}

function contextOf(place) {
  const shown = element("span", { class: "context" });
  if (place < 0) return (shown.append(element("mark", {}, "start of the document")), shown);
  const before = data.texts.slice(Math.max(0, place - context), place).join("");
  const after = data.texts.slice(place + 1, place + 1 + context).join("");
  // Empty lines at the ends are removed, because they would push the rest out of view.
  shown.append(before.replace(/^\s*\n/, ""), element("mark", {}, visible(data.texts[place]) || "\u00b7"), after.replace(/\n\s*$/, ""));
  return shown;
}

function bar(share, label) {
  const filled = element("span", { class: "meter", role: "img", "aria-label": label, title: label }, element("span"));
  filled.firstChild.style.width = `${Math.round(100 * Math.min(share, 1))}%`;
  return filled;
}

function headOf({ layer, head, gate, best }) {
  const title = LAYERS > 1 ? `Layer ${data.layers[layer]}, head ${head}` : `Head ${head}`;
  const list = element("ol", { class: "retrieved" });
  for (const source of best) {
    list.append(element("li", {}, element("button",
      { type: "button", class: "plain", "data-jump": source.place, title: "Show this token in the text", onclick: () => jump(source.place) },
      bar(source.weight, `weight ${source.weight.toFixed(3)}`), contextOf(source.place),
      element("small", {}, `${count(selected - source.place)} tokens back \u00b7 weight ${source.weight.toFixed(3)} \u00b7 score ${source.score.toFixed(2)}`))));
  }
  return element("section", { class: "head", "data-head": `${layer}.${head}` },
    element("h3", {}, title, element("small", {}, ` gate ${gate.toFixed(2)}`), bar(gate, `gate ${gate.toFixed(3)}`)),
    best.length ? list : element("p", { class: "muted" }, "The memory was still empty."));
}

function select(place, scroll = false) {
  for (const token of text.querySelectorAll(".selected, .source")) token.classList.remove("selected", "source");
  selected = place;
  const panel = document.getElementById("panel"), only = document.getElementById("head").value;
  const token = tokenAt(place);
  token.classList.add("selected");
  if (scroll) show(token);
  const heads = retrieved(place).filter(({ layer, head }) => only === "all" || only === `${layer}.${head}`);
  for (const { best } of heads) for (const source of best) tokenAt(source.place)?.classList.add("source");
  // The head with the largest contribution comes first.
  heads.sort((one, other) => other.gate * (other.best[0]?.weight ?? 0) - one.gate * (one.best[0]?.weight ?? 0));
  const isShown = place >= first && place < stop;
  panel.replaceChildren(
    element("h2", {}, "Token ", element("code", {}, visible(data.texts[place]) || "\u00b7"), element("small", {}, ` at ${count(place)}`)),
    element("p", {}, `Loss ${nats[place].toFixed(2)} nats with memory, ${(nats[place] + gains[place]).toFixed(2)} without: `,
      element("strong", { class: gains[place] < 0 ? "is-lost" : "is-gained" }, `${signed(gains[place])} gained`),
      correct[place] ? ". It was the model's first choice." : ". It was not the model's first choice."),
    element("p", { class: "muted" }, isShown ? "Retrieved when the model predicted this token:"
      : `Lookups are shown for tokens ${count(first)} to ${count(stop - 1)} only. Choose others with --first and --tokens.`),
    ...heads.map(headOf));
  panel.hidden = false;
  if (matchMedia("(max-width: 52rem)").matches) text.scrollIntoView(); // the panel is below the text and covers the rest
  history.replaceState(null, "", `#${place}`);
}

function jump(place) {
  const token = tokenAt(Math.max(place, 0));
  show(token);
  token.classList.remove("flash");
  void token.offsetWidth; // restarts the animation
  token.classList.add("flash");
}

function step(by) {
  if (selected === null) return select(first, true);
  const place = Math.min(Math.max(selected + by, 0), data.texts.length - 1);
  select(place);
  show(tokenAt(place), true);
}

function nextGain(sign) {
  const scale = Number(document.getElementById("scale").value) / 2;
  for (let place = (selected ?? first - 1) + 1; place < stop; place++) {
    if (sign * gains[place] >= scale) return select(place, true);
  }
  for (let place = first; place < stop; place++) if (sign * gains[place] >= scale) return select(place, true);
}

text.addEventListener("click", (event) => {
  const token = event.target.closest("[data-place]");
  if (token) select(Number(token.dataset.place));
});
text.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  step(by);
});

// Figures over the whole document.

function placesList(list, describe) {
  return element("ol", { class: "places" }, ...list.map((entry) => {
    const place = entry.place ?? entry;
    return element("li", {}, element("button", { type: "button", class: "plain", onclick: () => { select(place, true); } },
      contextOf(place), element("small", {}, describe(entry))));
  }));
}

function distancesOf({ distances }) {
  const shown = element("span", { class: "histogram", role: "img", "aria-label": "distances, by powers of two" });
  const largest = Math.max(...distances, 1e-9);
  distances.forEach((share, power) => {
    const column = element("span", { title: `${count(2 ** power)} to ${count(2 ** (power + 1) - 1)} tokens back: ${(100 * share).toFixed(1)}%` });
    column.style.height = `${(100 * share) / largest}%`;
    shown.append(column);
  });
  return shown;
}

function figures() {
  const { summary } = data;
  const several = LAYERS > 1;
  const heads = page.table(
    "Half of a head's weight goes to tokens at its median distance or farther. Bars: distances by powers of two, from 1",
    [
      { title: "head", value: ({ layer, head }) => (several ? `layer ${layer}, head ${head}` : `head ${head}`) },
      { title: data.gates_are_learned ? "gate" : "mean gate", value: ({ gate }) => gate, text: ({ gate }) => number(gate, 3), number: true },
      { title: "median, tokens", value: (head) => head.median_distance, text: (head) => count(head.median_distance), number: true },
      { title: "distances", value: (head) => head.median_distance, text: distancesOf },
    ], summary.heads);
  const kinds = page.table("Gain in nats per token, and share of the total gain", [
    { title: "kind", value: ({ kind }) => kind },
    { title: "tokens", value: ({ tokens }) => tokens, text: ({ tokens }) => count(tokens), number: true },
    { title: "gain", value: ({ gain }) => gain, text: ({ gain }) => signed(gain, 3), number: true },
    { title: "share", value: ({ share }) => share, text: ({ share }) => (share === null ? "\u2013" : `${number(100 * share)}%`), number: true },
  ], summary.kinds);
  return element("div", { id: "figures" },
    element("section", {}, element("h2", {}, "How far back heads look"), heads),
    element("section", {}, element("h2", {}, "What kinds of tokens gain"), kinds),
    element("section", {}, element("h2", {}, "Tokens that gained most"),
      placesList(summary.gained_most, (place) => `${signed(gains[place])} nats at ${count(place)}`)),
    element("section", {}, element("h2", {}, "Tokens that lost most"),
      placesList(summary.lost_most, (place) => `${signed(gains[place])} nats at ${count(place)}`)),
    element("section", {}, element("h2", {}, "Most used tokens in memory"),
      placesList(summary.used_most, ({ place, used }) => `total weight ${used.toFixed(1)} at ${count(place)}`)));
}

// The page.

const option = (value, label) => element("option", { value }, label);
const headOptions = [];
data.layers.forEach((layer, at) => {
  for (let head = 0; head < HEADS; head++) {
    headOptions.push(option(`${at}.${head}`, LAYERS > 1 ? `layer ${layer}, head ${head}` : `head ${head}`));
  }
});
const { about, summary } = data;
document.querySelector("main").append(
  element("h1", {}, about.document),
  element("p", {}, `${count(summary.tokens)} tokens, read by ${about.run} (step ${count(about.step)}) with a memory of ${count(about.memory_size)} tokens. Loss: `,
      `${summary.loss.toFixed(3)} nats per token with memory, ${summary.loss_without.toFixed(3)} without: `,
      element("strong", {}, `${signed(summary.gain, 3)} gained`), ". Select a token to see what each head retrieved for it."),
  element("div", { id: "controls", class: "controls", role: "group", "aria-label": "Display of the text" },
    element("label", {}, "Color ", element("select", { id: "color", oninput: color },
      option("gain", "gain"), option("loss", "loss"), option("none", "nothing"))),
    element("label", {}, "Full color at ", element("select", { id: "scale", oninput: color },
      option("0.5", "0.5 nats"), option("1", "1 nat"), option("2", "2 nats"), option("4", "4 nats"))),
    element("label", {}, "Head ", element("select", { id: "head", oninput: () => selected !== null && select(selected) },
      option("all", "all"), ...headOptions)),
    element("button", { type: "button", id: "next-gained", onclick: () => nextGain(1) }, "Next gain"),
    element("button", { type: "button", id: "next-lost", onclick: () => nextGain(-1) }, "Next loss"),
    element("span", { class: "legend" }, element("i", { class: "gained" }), " gained ", element("i", { class: "lost" }), " lost")),
  element("div", { id: "reading" }, text, element("aside", { id: "panel", "aria-live": "polite", hidden: "" })),
  figures());
document.getElementById("scale").value = "2";
color();
const linked = Number(location.hash.slice(1));
if (location.hash && Number.isInteger(linked) && linked >= 0 && linked < data.texts.length) select(linked, true);
}
