"use strict";
// The heat map: which candidate's errors it shows, and moving through its cells. All else on the page needs no script.
(() => {
  const map = document.getElementById("error-map");
  if (!map) return;
  const data = JSON.parse(document.getElementById("errors").textContent);
  const line = document.getElementById("cell");
  const cells = [...map.querySelectorAll("td[data-at]")];
  const place = new Map(cells.map((cell, index) => [cell, index]));
  let shown = document.querySelector('input[name="view"]:checked').value;
  let told = null;

  const stageOf = (view) => data.views.find(([key]) => key === view)[1];

  const describe = (cell) => {
    told = cell;
    const index = place.get(cell);
    const parts = data.views
      .filter(([key, stage]) => stage === stageOf(shown) && data.cells[key][index])
      .map(([key, , label]) => `${label} ${data.cells[key][index][1]} %`);
    line.textContent = `${cell.dataset.at}: ${parts.join(", ")}`;
  };

  const show = (view) => {
    shown = view;
    const values = data.cells[view];
    cells.forEach((cell, index) => {
      const value = values[index];
      cell.className = value ? `q${value[0]}` : "none";
      cell.firstChild.textContent = value ? value[1] : "–";
    });
    map.querySelectorAll("caption .aside").forEach((aside, index) => {
      aside.textContent = data.means[view][index];
    });
    document.querySelectorAll(".map-head [data-stage]").forEach((legend) => {
      legend.hidden = legend.dataset.stage !== stageOf(view);
    });
    if (told) describe(told);
  };

  const reach = (cell) => {
    cells.forEach((other) => (other.tabIndex = other === cell ? 0 : -1));
    cell.focus();
  };

  const step = (cell, down, right) => {
    const row = cell.parentElement;
    const rows = [...map.querySelectorAll("tbody tr")];
    for (let r = rows.indexOf(row) + down, c = cell.cellIndex + right; ; r += down, c += right) {
      if (r < 0 || r >= rows.length || c < 1) return;
      const next = rows[r].cells[c];
      if (!next) return;
      if (next.dataset.at) return reach(next);
    }
  };

  document.querySelectorAll('input[name="view"]').forEach((input) =>
    input.addEventListener("change", () => show(input.value)));
  map.addEventListener("focusin", (event) => {
    if (place.has(event.target)) describe(event.target);
  });
  map.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td[data-at]");
    if (cell) describe(cell);
  });
  map.addEventListener("click", (event) => {
    const cell = event.target.closest("td[data-at]");
    if (cell) reach(cell);
  });
  map.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td[data-at]");
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!cell || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Home" || event.key === "End") {
      const row = [...cell.parentElement.cells].filter((other) => other.dataset.at);
      event.preventDefault();
      reach(event.key === "Home" ? row[0] : row[row.length - 1]);
    } else if (moves[event.key]) {
      event.preventDefault();
      step(cell, ...moves[event.key]);
    }
  });
  document.documentElement.classList.add("scripted");
  show(shown);
})();
