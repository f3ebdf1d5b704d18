// A chart shows the value of each of its lines at the pointer.
"use strict";
(() => {
  const readout = document.getElementById("readout");
  const nearest = (xs, x) =>
    xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);
  for (const chart of document.querySelectorAll(".chart")) {
    const cursor = chart.querySelector(".cursor");
    const lines = [...chart.querySelectorAll("polyline")].filter((line) => line.points.numberOfItems).map((line) => ({
      name: line.dataset.name,
      pixels: Array.from(line.points, (point) => point.x),
      x: line.dataset.x.split(" "),
      y: line.dataset.y.split(" "),
    }));
    const hide = () => { readout.hidden = true; cursor.style.visibility = "hidden"; };
    chart.addEventListener("pointermove", (event) => {
      if (!lines.length) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
      const found = lines.map((line) => ({ line, i: nearest(line.pixels, at) }));
      const place = found[0].line.pixels[found[0].i];
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.style.visibility = "visible";
      const values = found.map(({ line, i }) => `${line.name}  ${line.y[i]}`);
      readout.textContent = [`at ${found[0].line.x[found[0].i]}`, ...values].join("\n");
      readout.hidden = false;
      readout.style.left = `${Math.min(event.clientX + 14, innerWidth - readout.offsetWidth - 8)}px`;
      readout.style.top = `${Math.min(event.clientY + 14, innerHeight - readout.offsetHeight - 8)}px`;
    });
    chart.addEventListener("pointerleave", hide);
  }
})();
