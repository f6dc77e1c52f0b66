// Sorting and filtering of the tables. Everything else on these pages works without it.
"use strict";

const numeric = text => text !== "" && !Number.isNaN(Number(text));

function sortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const compare = (a, b) => numeric(a) && numeric(b) ? a - b : a.localeCompare(b);
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    // numbers are best from the top, unless the head says otherwise; a third click restores the table's own order
    const first = head.dataset.first ?? "descending", second = first === "descending" ? "ascending" : "descending";
    const now = before === null ? first : before === first ? second : null;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    if (now === null) { body.append(...rows); table.dispatchEvent(new Event("sorted")); return; }
    head.setAttribute("aria-sort", now);
    const sign = now === "ascending" ? 1 : -1;
    const keyed = rows.map((row, place) => ({ row, place, key: row.cells[column].dataset.value }));
    keyed.sort((a, b) => {
      if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "") || a.place - b.place; // nothing comes last
      return sign * compare(a.key, b.key) || a.place - b.place;
    });
    body.append(...keyed.map(one => one.row));
    table.dispatchEvent(new Event("sorted"));
  }));
}

function filterable(form) {
  const table = document.getElementById(form.getAttribute("data-filters")), body = table.tBodies[0];
  const first = Number(body.dataset.first), more = form.querySelector("button[type=button]");
  const others = [...document.querySelectorAll("figure[data-suite], #headlines tbody tr")];
  const fields = [...form.querySelectorAll("select, input")], count = form.querySelector("output");
  const texts = new Map();
  let most = first;

  function text(row) {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  }

  function apply() {
    const wanted = fields.filter(one => one.value && one.name !== "search").map(one => [one.name, one.value]);
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...body.rows];
    let fitting = 0;
    rows.forEach(row => {
      const fits = wanted.every(([name, value]) => row.dataset[name] === value) && words.every(word => text(row).includes(word));
      fitting += fits;
      const hidden = !fits || fitting > most; // a browser takes long to lay out thousands of rows
      if (row.hidden !== hidden) row.hidden = hidden;
    });
    others.forEach(one => { one.hidden = wanted.some(([name, value]) => name in one.dataset && one.dataset[name] !== value); });
    count.textContent = `${fitting} of ${rows.length}` + (fitting > most ? `, the first ${most} shown` : "");
    more.hidden = fitting <= most;
  }
  function remember() {
    const chosen = fields.filter(one => one.value).map(one => [one.name, one.value]);
    history.replaceState(null, "", chosen.length ? "#" + new URLSearchParams(chosen) : location.pathname + location.search);
  }
  function recall() {
    const asked = new URLSearchParams(location.hash.slice(1));
    fields.forEach(one => { one.value = asked.get(one.name) ?? ""; if (one.value === "" && one.options) one.selectedIndex = 0; });
    apply();
  }
  function changed() { most = first; apply(); remember(); }
  form.addEventListener("input", changed);
  form.addEventListener("reset", () => setTimeout(changed));
  more.addEventListener("click", () => { most = Infinity; apply(); });
  table.addEventListener("sorted", () => { most = first; apply(); });
  form.addEventListener("submit", event => event.preventDefault());
  window.addEventListener("hashchange", recall);
  recall();
  body.querySelectorAll(".later").forEach(row => row.classList.remove("later"));
  form.hidden = false;
}

document.querySelectorAll("table").forEach(table => { if (table.tHead?.querySelector("button")) sortable(table); });
document.querySelectorAll("form[data-filters]").forEach(filterable);
