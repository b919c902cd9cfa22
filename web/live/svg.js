// @ts-check
// SVG elements for the charts. Imports nothing.

/** Colours that follow ComfyUI's theme. */
export const COLOURS = {
  ink: "var(--input-text, #ddd)",
  faint: "var(--descrip-text, #999)",
  grid: "color-mix(in srgb, var(--descrip-text, #999) 26%, transparent)",
  bars: "color-mix(in srgb, var(--p-primary-color, #4a8fe0) 45%, transparent)",
  line: "var(--p-primary-color, #4a8fe0)",
  second: "#e8892b",
  third: "#1fae86",
};

/** An SVG element with attributes and children; a string child is text. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Text of the chart; `anchor` is start, middle or end. */
export function label(x, y, text, { anchor = "start", fill = COLOURS.faint, size = 10, weight = 400 } = {}) {
  return svg("text", { x, y, fill, "text-anchor": anchor, "font-size": size, "font-weight": weight }, text);
}

/** A polyline path; null breaks the line. @param {[number, number | null][]} points */
export function path(points, attributes) {
  let move = true;
  const d = points.map(([x, y]) => {
    if (y == null) {
      move = true;
      return "";
    }
    const step = `${move ? "M" : "L"}${x.toFixed(2)},${y.toFixed(2)}`;
    move = false;
    return step;
  });
  return svg("path", { d: d.join(""), fill: "none", "stroke-width": 1.75, "stroke-linejoin": "round", ...attributes });
}

/** Round tick values from 0 to `highest`, about `count` of them. */
export function ticks(highest, count) {
  const rough = highest / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? rough;
  return Array.from({ length: Math.floor(highest / step + 1e-9) + 1 }, (_, index) => index * step);
}
