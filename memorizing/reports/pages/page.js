"use strict";
/* What scripts of every page use: the page's data, elements made of text (never of markup), tables that sort, the theme. */
const page = (() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null;  // by the button; until then the system decides
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

  /** An element. Attributes that start with "on" are listeners; children are elements or text; null ones are left out. */
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return made;
  }

  /** A table in a box of its own that scrolls. Columns: {title, value(row), text(row)?, number?, words?, help?};
      the first column names the rows, `number` ones stand at the right, `words` get room. */
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
        const missing = (it) => it === null || it === undefined;
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

  /** A number for people: so many digits behind the point, thousands divided; a dash for what there is not. */
  function number(value, digits = 0, sign = false) {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en-US", {
      minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: sign ? "always" : "auto",
    });
  }

  return {
    element, table, number,
    get data() { return (data ??= JSON.parse(document.getElementById("data").textContent)); },
    /** The value of a color variable of page.css in the theme at hand. */
    color: (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim(),
    /** Calls whenever colors have changed. */
    onTheme: (listener) => listeners.push(listener),
  };
})();
