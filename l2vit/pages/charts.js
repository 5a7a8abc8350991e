// Values under the pointer, and curves shown or hidden by their keys. Each chart carries its data.
"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const holder = figure.querySelector("script");
  if (!holder) continue;
  const data = JSON.parse(holder.textContent);
  const svg = figure.querySelector("svg"), cross = figure.querySelector(".cross");
  const [left, , width] = data.box, [low, high] = data.range;
  const xs = [...new Set(data.series.flatMap(s => s.points.map(p => p[0])))].sort((a, b) => a - b);
  const hidden = new Set();
  const tip = document.createElement("div");
  tip.className = "tip";
  figure.append(tip);
  let shown = -1;

  const nearest = (values, x) => {
    let from = 0, to = values.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (values[middle] <= x) from = middle; else to = middle;
    }
    return Math.abs(values[from] - x) <= Math.abs(values[to] - x) ? from : to;
  };
  const number = value => Number(value.toPrecision(6)).toLocaleString("en", {maximumSignificantDigits: 6});
  const line = (text, color) => {
    const row = document.createElement("div");
    if (color) {
      const dot = document.createElement("i");
      dot.style.background = color;
      row.append(dot);
    }
    row.append(text);
    return row;
  };

  function show(index) {
    shown = index;
    const x = xs[index], at = left + (high > low ? (x - low) / (high - low) : 0.5) * width;
    const epoch = data.per_epoch ? `, epoch ${(x / data.per_epoch).toFixed(2)}` : "";
    tip.replaceChildren(line(`${data.x_label} ${number(x)}${epoch}`));
    data.series.forEach((series, i) => {
      if (hidden.has(i)) return;
      const point = series.points[nearest(series.points.map(p => p[0]), x)];
      const elsewhere = point[0] === x ? "" : ` (${data.x_label} ${number(point[0])})`;
      tip.append(line(`${series.name} ${number(point[1])}${elsewhere}`, series.color));
    });
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    cross.style.visibility = tip.style.visibility = "visible";
    const drawn = svg.getBoundingClientRect(), scale = drawn.width / svg.viewBox.baseVal.width;
    const room = figure.clientWidth - tip.offsetWidth;
    const beside = at * scale > drawn.width / 2 ? at * scale - tip.offsetWidth - 10 : at * scale + 10;
    tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
    tip.style.top = `${svg.offsetTop || drawn.top - figure.getBoundingClientRect().top}px`;
  }
  function hide() {
    shown = -1;
    cross.style.visibility = tip.style.visibility = "hidden";
  }
  svg.addEventListener("pointermove", event => {
    const drawn = svg.getBoundingClientRect();
    const at = (event.clientX - drawn.left) / drawn.width * svg.viewBox.baseVal.width;
    show(nearest(xs, low + (at - left) / width * (high - low)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(xs.length - 1, shown < 0 ? (step > 0 ? 0 : xs.length - 1) : shown + step)));
  });
  for (const button of figure.querySelectorAll(".keys button")) {
    button.addEventListener("click", () => {
      const i = Number(button.dataset.series), visible = hidden.delete(i);
      if (!visible) hidden.add(i);
      button.setAttribute("aria-pressed", visible);
      for (const drawn of svg.querySelectorAll(`[data-series="${i}"]`)) {
        drawn.style.visibility = visible ? "" : "hidden";
      }
    });
  }
}
