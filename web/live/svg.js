// @ts-check
// SVG elements for the charts. Imports nothing.

const INK = "var(--input-text, #ddd)";

/** ComfyUI's colour mixed with its text colour: lighter on a dark theme, darker on a light one. */
function toned(colour, percent) {
  return `color-mix(in srgb, ${colour} ${percent}%, ${INK})`;
}

/** Colours that follow ComfyUI's theme. */
export const COLOURS = {
  ink: INK,
  faint: toned("var(--descrip-text, #999)", 70),
  grid: "color-mix(in srgb, var(--descrip-text, #999) 26%, transparent)",
  bars: "color-mix(in srgb, var(--p-primary-color, #60a5fa) 45%, transparent)",
  line: "var(--p-primary-color, #60a5fa)",
  second: toned("var(--p-orange-500, #f97316)", 80),
  third: toned("var(--p-emerald-500, #10b981)", 80),
  error: toned("var(--error-text, #ff4444)", 60),
};

/** An SVG element with attributes and children; a string child is text. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Text of the chart; `anchor` is start, middle or end. */
export function label(x, y, text, { anchor = "start", fill = COLOURS.faint } = {}) {
  return svg("text", { x, y, fill, "text-anchor": anchor, "font-size": 10 }, text);
}

/** A straight line of the grid, or in another colour. */
export function line(x1, y1, x2, y2, attributes = {}) {
  return svg("line", { x1, y1, x2, y2, stroke: COLOURS.grid, ...attributes });
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

/** Elements that are cut off above and below; a curve may leave the plot. */
export function clipped(width, top, bottom, elements) {
  const height = Math.max(1, bottom - top);
  return svg("svg", { y: top, width, height, viewBox: `0 ${top} ${width} ${height}` }, ...elements);
}

/** What a reader can point at: an invisible rectangle over one bar, and the sentence about it. */
export function column(left, right, top, bottom, reading) {
  const size = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
  return svg("rect", { class: "braid-column", "data-reading": reading, ...size });
}

/** The gap between bars that are `width` pixels apart. */
export function gap(width) {
  return Math.min(1, 0.15 * width);
}

/** Round tick values from 0 to `highest`, about `count` of them. */
export function ticks(highest, count) {
  const rough = highest / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? rough;
  return Array.from({ length: Math.floor(highest / step + 1e-9) + 1 }, (_, index) => index * step);
}

/** A number as short as its digits allow: 0.25, 5e-5, 150K. */
export function short(value, digits = 3) {
  const rounded = +value.toPrecision(digits);
  if (Math.abs(rounded) >= 1e4) return COMPACT.format(rounded);
  return rounded !== 0 && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
}

const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
