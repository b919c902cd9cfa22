// @ts-check
// The steps a run will skip, as SVG: draws the numbers of nodes/magcache/live.py, decides nothing.

import { said, words } from "../language/texts.js";
import { COLOURS, column, label, line, short, svg } from "../live/svg.js";

const MARGIN = { left: 48, right: 14, top: 6, bottom: 30 };
const STRIP = 20;
const ROOM_FOR_STEP = 38;

export const name = () => words("Steps that MagCache skips");

/** What stands above the plot. @param {any} answer strip() of nodes/magcache/live.py */
export function heading({ computed, steps, speedup, warnings, ...rest }) {
  const saved = words("{speedup}× fewer evaluations", { speedup: speedup.toFixed(2) });
  const title = words("{computed} of {steps} steps computed", { computed, steps });
  return {
    title: computed < steps ? `${title} · ${saved}` : title,
    subtitle: subtitle(rest),
    legend: legend(),
    note: warnings.length ? note(warnings) : undefined,
  };
}

/** @returns {import("../live/face.js").Heading["legend"]} */
function legend() {
  return [
    [words("computed"), COLOURS.line, "bar"],
    [words("skipped"), COLOURS.grid, "bar"],
    [words("error since a computed step"), COLOURS.second, "bar"],
  ];
}

function note([warning, ...more]) {
  const first = said(warning);
  return more.length ? words("{first} (and {count} more)", { first, count: more.length }) : first;
}

function subtitle({ name, rule, predict, total_error, predicted_rms }) {
  const parts = [said(name), rule === "planned" ? `planned, ${predict}` : "magcache, reuse"];
  if (rule !== "planned" && total_error) parts.push(words("error up to {error}", { error: short(total_error) }));
  if (predicted_rms) parts.push(words("predicted error {error} (latent RMS)", { error: short(predicted_rms) }));
  return parts.join(" · ");
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
    label(middle, bottom + 25, words("sampling step"), { anchor: "middle" }),
  ];
  if (top <= 0) return [...axis, label(middle, (roof + bottom) / 2, words("no step is skipped"), { anchor: "middle" })];
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
    const error = short(accumulated[index]);
    const done = skips.has(index) ? words("skipped, error {error}", { error }) : words("computed");
    const at = { step: index + 1, steps, sigma: short(sigmas[index], 4), done };
    const reading = words("step {step} of {steps}, σ {sigma}: {done}", at);
    return column(left + index * step, left + (index + 1) * step, MARGIN.top, bottom, reading);
  });
}
