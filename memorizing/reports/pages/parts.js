"use strict";
/* What the report of a run and that of a sweep show alike: heading, notices, settings; and how readings are called. */
const parts = (() => {
  const { element, number, table, data } = page;
  const at = (id) => document.getElementById(id);

  /** In place of what is not there. */
  const missing = (id, text) => at(id).append(element("p", { class: "notice" }, text));

  /** The choices of a select: [value, text]. */
  const options = (id, values) =>
    at(id).replaceChildren(...values.map(([value, text]) => element("option", { value }, text)));

  const interval = ([low, high], digits, sign) =>
    low === null || low === undefined ? "" : `[${number(low, digits, sign)}, ${number(high, digits, sign)}]`;

  const textOf = (figures) => [figures.corpus, figures.split, figures.name].filter(Boolean).join(" · ");
  const inWords = (xl) => (xl ? "with XL cache" : "without XL cache");

  function showHeading() {
    at("title").textContent = data.title;
    at("sentence").textContent = data.sentence;
    at("made").textContent = `Made ${data.made} by memorizing ${data.version} from ${data.workdir}.`;
    at("notices").append(...data.notices.map((notice) => element("p", { class: "notice" }, notice)));
  }

  function showSettings() {
    if (!data.settings.length) {
      at("settings").hidden = true;
      return missing("configuration", "No settings were found (config.gin).");
    }
    const list = () => {
      const wanted = at("settings-search").value.toLowerCase();
      const found = data.settings.filter((it) => `${it.name} = ${it.value}`.toLowerCase().includes(wanted));
      at("settings-count").textContent = `${number(found.length)} of ${number(data.settings.length)}`;
      at("settings-table").replaceChildren(table("Settings, defaults included", [
        { title: "Setting", value: (row) => row.name, text: (row) => element("code", {}, row.name) },
        { title: "Value", value: (row) => row.value, text: (row) => element("code", {}, row.value) },
      ], found, { tall: true }));
    };
    at("settings-search").addEventListener("input", list);
    list();
  }

  return { at, missing, options, interval, textOf, inWords, showHeading, showSettings };
})();
