"use strict";
/* Shared by the reports of runs and sweeps: heading, notices, settings, and names of evaluations. */
const report = (() => {
  const { element, number, table, data } = page;
  const at = (id) => document.getElementById(id);

  /** Shows a notice in place of a missing section. */
  const missing = (id, text) => at(id).append(element("p", { class: "notice" }, text));

  /** Sets the choices of a select element: [value, text]. */
  const options = (id, values) =>
    at(id).replaceChildren(...values.map(([value, text]) => element("option", { value }, text)));

  const interval = ([low, high], digits, sign) =>
    low === null || low === undefined ? "" : `[${number(low, digits, sign)}, ${number(high, digits, sign)}]`;

  const textOf = (figures) => [figures.corpus, figures.split, figures.name].filter(Boolean).join(" · ");
  const cacheName = (xlCache) => (xlCache ? "with XL cache" : "without XL cache");

  function showHeading() {
    at("title").textContent = data.title;
    at("description").textContent = data.description;
    at("origin").textContent = `Made on ${data.created} by memorizing ${data.version} from ${data.workdir}.`;
    at("notices").append(...data.notices.map((notice) => element("p", { class: "notice" }, notice)));
  }

  function showSettings() {
    if (!data.settings.length) {
      at("settings").hidden = true;
      return missing("configuration", "No settings were found (config.gin).");
    }
    const list = () => {
      const query = at("settings-search").value.toLowerCase();
      const found = data.settings.filter(({ name, value }) => `${name} = ${value}`.toLowerCase().includes(query));
      at("settings-count").textContent = `${number(found.length)} of ${number(data.settings.length)}`;
      at("settings-table").replaceChildren(table("Settings, defaults included", [
        { title: "Setting", value: (row) => row.name, text: (row) => element("code", {}, row.name) },
        { title: "Value", value: (row) => row.value, text: (row) => element("code", {}, row.value) },
      ], found, { tall: true }));
    };
    at("settings-search").addEventListener("input", list);
    list();
  }

  return { at, missing, options, interval, textOf, cacheName, showHeading, showSettings };
})();
