"use strict";
/* Shared by the scripts of all pages: the page's data, elements made from text (never from markup), sortable tables, the theme. */
const page = (() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null;  // set by the button; until then the system's theme is used
  let data;

  function showTheme() {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    const button = document.getElementById("theme");
    if (button) button.textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
    if (button) button.setAttribute("aria-label", `Change to ${button.textContent.toLowerCase()} colors`);
    listeners.forEach((listener) => listener());
  }

  system.addEventListener("change", showTheme);
  document.addEventListener("DOMContentLoaded", () => {
    showTheme();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = root.dataset.theme === "dark" ? "light" : "dark";
      showTheme();
    });
  });
  showTheme();

  /** Returns an element. Attributes that start with "on" are listeners; children are elements or text; null ones are skipped. */
  function element(tag, attributes = {}, ...children) {
    const created = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) created.addEventListener(name.slice(2), value);
      else created.setAttribute(name, value === true ? "" : value);
    }
    created.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return created;
  }

  /** Returns a table in a scrolling box. Columns: {title, value(row), text(row)?, number?, words?, help?}. The first column
      names the rows; `number` columns are aligned to the right; `words` columns are wider. */
  function table(caption, columns, rows, { tall = false, sorted = null } = {}) {
    const body = element("tbody"), kind = (column) => (column.number ? "number" : column.words && "words");
    const heads = columns.map((column, index) =>
      element("th", { scope: "col", class: kind(column), title: column.help },
        element("button", { type: "button", onclick: () => sort(index) }, column.title)));
    let order = sorted;  // [column, "ascending" or "descending"]

    function show() {
      const shown = [...rows];
      if (order) {
        const { value } = columns[order[0]], sign = order[1] === "ascending" ? 1 : -1;
        const missing = (value) => value === null || value === undefined;
        shown.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (missing(x) || missing(y)) return missing(x) - missing(y);
          return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
        });
      }
      heads.forEach((head, index) => {
        if (order && order[0] === index) head.setAttribute("aria-sort", order[1]);
        else head.removeAttribute("aria-sort");
      });
      body.replaceChildren(...shown.map((row) => element("tr", {}, columns.map((column, index) => {
        const content = column.text ? column.text(row) : column.value(row) ?? "–";
        return element(index ? "td" : "th", { scope: index ? null : "row", class: kind(column) }, content);
      }))));
    }

    function sort(index) {
      const again = order && order[0] === index;
      order = [index, again && order[1] === "ascending" ? "descending" : "ascending"];
      show();
    }

    show();
    return element("div", { class: tall ? "scroll tall" : "scroll", role: "region", "aria-label": caption, tabindex: 0 },
      element("table", {}, element("caption", {}, element("span", {}, caption)),
        element("thead", {}, element("tr", {}, heads)), body));
  }

  /** Formats a number with this many decimal places and thousands separators; a dash for a missing value. */
  function number(value, digits = 0, sign = false) {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en-US", {
      minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: sign ? "always" : "auto",
    });
  }

  return {
    element, table, number,
    get data() { return (data ??= JSON.parse(document.getElementById("data").textContent)); },
    /** Returns the value of a color variable of page.css in the current theme. */
    color: (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim(),
    /** Calls the listener whenever the colors change. */
    onTheme: (listener) => listeners.push(listener),
  };
})();
