"use strict";
// Sorting, filtering and jumping on the page. Everything else works without it.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const UNITS = { ms: 1e-3, s: 1, min: 60, h: 3600, B: 1, kB: 1e3, MB: 1e6, GB: 1e9 };

  // The value of a cell as shown: "0.912 ± 0.01", "2 h 05 min", "1.27 MB"; NaN for other text.
  const valueOf = (text) => {
    const plain = text.replaceAll("\u2212", "-").replaceAll(",", "");
    if (!/^[+-]?[\d.]/.test(plain)) return NaN;
    const first = plain.match(/^[+-]?[\d.]+/)[0];
    let total = 0;
    let found = false;
    for (const [, number, unit] of plain.matchAll(/([\d.]+) (ms|s|min|h|B|kB|MB|GB)(?![a-zA-Z])/g)) {
      total += Number(number) * UNITS[unit];
      found = true;
    }
    return found ? total : Number(first);
  };
  const textOf = (cell) => (cell?.querySelector(".value") ?? cell)?.textContent.trim() ?? "";
  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    if (!Number.isNaN(x) || !Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const isAbsent = (text) => text === "" || text === "\u2013" || text === "missing";

  // Sorting: a button in each head; a third press restores the order of the page.
  for (const table of all("table")) {
    const heads = all("thead th", table);
    const bodies = [...table.tBodies].map((body) => ({ body, rows: [...body.rows] }));
    if (!heads.length || !bodies.some(({ rows }) => rows.length > 2)) continue;
    heads.forEach((head, column) => {
      const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        const next = { ascending: "descending", descending: null }[before];
        const order = before ? next : "ascending";
        if (order) head.setAttribute("aria-sort", order);
        const sign = order === "descending" ? -1 : 1;
        for (const { body, rows } of bodies) {
          const fixed = rows.filter((row) => row.classList.contains("group"));
          const keyed = rows
            .filter((row) => !row.classList.contains("group"))
            .map((row) => ({ row, text: textOf(row.cells[column]) }));
          if (order) {
            keyed.sort((a, b) => {
              if (isAbsent(a.text) || isAbsent(b.text)) return isAbsent(a.text) - isAbsent(b.text);
              return sign * compare(a.text, b.text);
            });
          }
          body.append(...fixed, ...keyed.map(({ row }) => row));
        }
      });
    });
  }

  // Filtering of long tables: rows that contain every word.
  for (const table of all(".wide > table:not(.stacked)")) {
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
    const entries = rows.filter((row) => !row.classList.contains("group"));
    if (entries.length < 8) continue;
    const texts = entries.map((row) => row.textContent.toLowerCase());
    const input = make("input", { type: "search", autocomplete: "off", spellcheck: "false" });
    const count = make("output", { "aria-live": "polite" }, `${entries.length} rows`);
    table.parentElement.before(make("p", { class: "filter" }, make("label", {}, "Filter rows ", input), count));
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      entries.forEach((row, place) => {
        row.hidden = !words.every((word) => texts[place].includes(word));
        shown += !row.hidden;
      });
      count.textContent = words.length ? `${shown} of ${entries.length} rows` : `${entries.length} rows`;
    });
  }

  // One hospital: everything that belongs to another one is hidden.
  const owned = all("[data-hospital]").filter((node) => node.dataset.hospital);
  const hospitals = [...new Set(owned.map((node) => node.dataset.hospital))];
  hospitals.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const select = make("select", {}, make("option", { value: "" }, "all hospitals"));
  select.append(...hospitals.map((name) => make("option", { value: name }, name)));
  const note = make("output", { "aria-live": "polite" });
  const choose = (name) => {
    select.value = name;
    for (const node of owned) node.classList.toggle("off", Boolean(name) && node.dataset.hospital !== name);
    note.textContent = name
      ? `Only ${name} is shown; averages, differences and p values are still those of all hospitals.`
      : "";
  };
  select.addEventListener("change", () => choose(select.value));
  const folds = make("button", { type: "button" }, "Open all parts");
  folds.addEventListener("click", () => {
    const open = folds.textContent === "Open all parts";
    all("details").forEach((part) => (part.open = open));
    folds.textContent = open ? "Close all parts" : "Open all parts";
  });
  const tools = make("div", { class: "tools", role: "group", "aria-label": "What is shown" });
  if (hospitals.length > 1) tools.append(make("label", {}, "Hospital ", select));
  tools.append(folds, note);
  document.querySelector("header").after(tools);

  // A link into a closed part or to a hospital that is not shown opens it.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.closest(".off")) choose("");
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    if (!target.hasAttribute("tabindex")) target.setAttribute("tabindex", "-1");
    target.scrollIntoView();
    target.focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.hash === location.hash) reveal();
  });
  reveal();
})();
