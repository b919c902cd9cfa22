// @ts-check
// The steps a run will skip, as SVG: draws the numbers of nodes/magcache/live.py, decides nothing.

import { COLOURS, column, label, line, short, svg } from "../live/svg.js";

const MARGIN = { left: 48, right: 14, top: 6, bottom: 30 };
const STRIP = 20;
const ROOM_FOR_STEP = 38;

/** @type {import("../live/face.js").Heading["legend"]} */
const LEGEND = [
  ["computed", COLOURS.line, "bar"],
  ["skipped", COLOURS.grid, "bar"],
  ["error since a computed step", COLOURS.second, "bar"],
];

export const name = "Steps that MagCache skips";

/** What stands above the plot. @param {any} answer strip() of nodes/magcache/live.py */
export function heading({ computed, steps, speedup, warnings, ...rest }) {
  const more = warnings.length > 1 ? ` (and ${warnings.length - 1} more)` : "";
  return {
    title: `${computed} of ${steps} steps computed${computed < steps ? ` · ${speedup.toFixed(2)}× fewer evaluations` : ""}`,
    subtitle: subtitle(rest),
    legend: LEGEND,
    note: warnings.length ? `${warnings[0]}${more}` : undefined,
  };
}

function subtitle({ name, rule, predict, total_error, predicted_rms }) {
  const how = rule === "planned" ? `planned, ${predict}` : "magcache, reuse";
  const expected = !predicted_rms ? "" : ` · predicted error ${short(predicted_rms)} (latent RMS)`;
  const gathered = rule === "planned" || !total_error ? "" : ` · error up to ${short(total_error)}`;
  return `${name} · ${how}${gathered}${expected}`;
}

/**
 * @param {any} answer strip() of nodes/magcache/live.py
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const frame = { left: MARGIN.left, right: width - MARGIN.right, bottom: height - MARGIN.bottom };
  const step = (frame.right - frame.left) / answer.steps;
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "braid-magcache" },
    ...strip(answer, frame.left, step),
    ...errors(answer, frame, step),
    ...columns(answer, frame, step),
  );
}

function strip({ steps, skipped }, left, step) {
  const skips = new Set(skipped);
  const gap = Math.min(2, 0.18 * step);
  return Array.from({ length: steps }, (_, index) =>
    svg("rect", {
      class: skips.has(index) ? "braid-skipped" : "braid-computed",
      x: left + index * step + gap / 2,
      y: MARGIN.top,
      width: Math.max(0.5, step - gap),
      height: STRIP,
      rx: Math.min(2, step / 4),
      fill: skips.has(index) ? COLOURS.grid : COLOURS.line,
    }),
  );
}

function errors({ steps, accumulated }, { left, right, bottom }, step) {
  const roof = MARGIN.top + STRIP + 10;
  const top = Math.max(...accumulated);
  const middle = (left + right) / 2;
  const axis = [
    line(left, bottom, right, bottom, { stroke: COLOURS.faint }),
    ...stepLabels(steps, right - left).map((index) =>
      label(left + (index + 0.5) * step, bottom + 12, String(index + 1), { anchor: "middle" }),
    ),
    label(middle, bottom + 25, "sampling step", { anchor: "middle" }),
  ];
  if (top <= 0) return [...axis, label(middle, (roof + bottom) / 2, "no step is skipped", { anchor: "middle" })];
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
  return [...bars, ...axis, label(left - 5, roof + 4, short(top), { anchor: "end" })];
}

/** As many step indices as have room in so many pixels, the first and the last among them. */
function stepLabels(steps, pixels) {
  const count = Math.max(2, Math.min(steps, 8, Math.floor(pixels / ROOM_FOR_STEP)));
  return [...new Set(Array.from({ length: count }, (_, i) => Math.round((i * (steps - 1)) / (count - 1))))];
}

function columns({ steps, skipped, sigmas, accumulated }, { left, bottom }, step) {
  const skips = new Set(skipped);
  return Array.from({ length: steps }, (_, index) => {
    const done = skips.has(index) ? `skipped, error ${short(accumulated[index])}` : "computed";
    const reading = `step ${index + 1} of ${steps}, σ ${short(sigmas[index], 4)}: ${done}`;
    return column(left + index * step, left + (index + 1) * step, MARGIN.top, bottom, reading);
  });
}
