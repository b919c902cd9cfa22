// @ts-check
// The steps a run will skip, as SVG: draws the numbers of nodes/magcache_inputs.py, decides nothing.

import { COLOURS, label, svg } from "../live/svg.js";

const MARGIN = { left: 40, right: 14, top: 38, bottom: 30 };
const STRIP = 20;
const WARNING_LINE = 13;

/**
 * @param {any} answer schedule_dict of engine/magcache/report.py, with name and rule
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "braid-magcache" });
  const warned = answer.warnings.length ? WARNING_LINE : 0;
  const frame = { left: MARGIN.left, right: width - MARGIN.right, bottom: height - MARGIN.bottom - warned };
  const step = (frame.right - frame.left) / answer.steps;
  root.append(
    label(MARGIN.left, 16, title(answer), { fill: COLOURS.ink, size: 12, weight: 600 }),
    label(MARGIN.left, 30, subtitle(answer), { size: 9.5 }),
    ...strip(answer, frame.left, step),
    ...errors(answer, frame, step),
  );
  if (warned) root.append(warning(answer.warnings, height));
  return root;
}

function title({ computed, steps, speedup }) {
  return `${computed} of ${steps} steps computed · ${speedup.toFixed(2)}× fewer evaluations`;
}

function subtitle({ name, rule, predict, total_error, predicted_rms }) {
  const how = rule === "planned" ? `planned, ${predict}` : "magcache, reuse";
  const expected = predicted_rms == null ? "" : ` · predicted error ${number(predicted_rms)} (latent RMS)`;
  const gathered = rule === "planned" ? "" : ` · largest accumulated error ${number(total_error)}`;
  return `${name} · ${how}${gathered}${expected}`;
}

function number(value) {
  return String(+value.toPrecision(3));
}

function strip({ steps, skipped, sigmas, accumulated }, left, step) {
  const skips = new Set(skipped);
  const gap = Math.min(2, 0.18 * step);
  return Array.from({ length: steps }, (_, index) => {
    const skip = skips.has(index);
    const text = `step ${index + 1} of ${steps}, σ ${sigmas[index]}: ${skip ? `skipped, error ${number(accumulated[index])}` : "computed"}`;
    return svg(
      "rect",
      {
        class: skip ? "braid-skipped" : "braid-computed",
        x: left + index * step + gap / 2,
        y: MARGIN.top,
        width: Math.max(0.5, step - gap),
        height: STRIP,
        rx: Math.min(2, step / 4),
        fill: skip ? COLOURS.grid : COLOURS.line,
      },
      svg("title", {}, text),
    );
  });
}

function errors({ steps, accumulated }, { left, right, bottom }, step) {
  const roof = MARGIN.top + STRIP + 10;
  const top = Math.max(...accumulated);
  const floor = svg("line", { x1: left, y1: bottom, x2: right, y2: bottom, stroke: COLOURS.faint });
  const axis = [
    ...stepLabels(steps).map((index) =>
      label(left + (index + 0.5) * step, bottom + 12, String(index + 1), { anchor: "middle", size: 9 }),
    ),
    label((left + right) / 2, bottom + 24, "sampling step   (orange: error gathered since a computed one)", { anchor: "middle", size: 9.5 }),
  ];
  if (top <= 0) {
    const middle = (roof + bottom) / 2;
    return [floor, ...axis, label((left + right) / 2, middle, "no step is skipped", { anchor: "middle" })];
  }
  const bars = accumulated.map((value, index) => {
    const tall = (value / top) * (bottom - roof);
    return svg("rect", {
      x: left + index * step + 0.1 * step,
      y: bottom - tall,
      width: 0.8 * step,
      height: tall,
      fill: COLOURS.second,
    });
  });
  return [...bars, floor, ...axis, label(left - 5, roof + 4, number(top), { anchor: "end", size: 9 })];
}

/** About eight step indices, the first and the last among them. */
function stepLabels(steps) {
  const count = Math.min(steps, 8);
  return [...new Set(Array.from({ length: count }, (_, i) => Math.round((i * (steps - 1)) / Math.max(count - 1, 1))))];
}

function warning(warnings, height) {
  const text = warnings.length > 1 ? `${warnings[0]} (and ${warnings.length - 1} more)` : warnings[0];
  return svg("g", { role: "alert" }, label(MARGIN.left, height - 5, text, { fill: COLOURS.second, size: 9.5 }), svg("title", {}, warnings.join("\n")));
}
