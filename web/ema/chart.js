// @ts-check
// Weight of each checkpoint over training time as SVG: draws the numbers of
// nodes/ema/live.py and computes no weight.

import { said, words } from "../language/texts.js";
import { COLOURS, column, gap, label, line, path, short, svg, ticks } from "../live/svg.js";

const MARGIN = { left: 40, right: 14, top: 10, bottom: 38 };
const ROOM = [[38, 1], [26, 0]]; // a bar of so many pixels has room for a percentage of so many decimals
const ROOM_FOR_MARKS = 3;

export const name = () => words("Weight of each checkpoint");

/** What stands above the plot. @param {any} answer chart_json of nodes/ema/live.py */
export function heading(answer) {
  const { count, sigma_rel, requested_sigma_rel, unit, ideal } = answer;
  const requested = requested_sigma_rel?.toFixed(3);
  const files = count === 1 ? words("1 checkpoint") : words("{count} checkpoints", { count });
  const asked = requested == null ? "" : `, ${words("requested {requested}", { requested })}`;
  const legend = [
    [words("weight per {unit} (area = weight)", { unit: one(unit) }), COLOURS.bars, "bar"],
    ideal && [words("ideal profile"), COLOURS.second, "line"],
  ];
  return {
    title: `${files}: sigma_rel ${sigma_rel.toFixed(3)}${asked}`,
    subtitle: subtitle(answer),
    legend: legend.filter(Boolean),
  };
}

function subtitle({ note, order_from, centre_of_mass, duplicates_left_out, earlier_files_left_out }) {
  const parts = [words("centre of mass {share} T", { share: centre_of_mass.toFixed(3) })];
  parts.push(note ? said(note) : words("order: {from}", { from: order_from }));
  const twice = duplicates_left_out.length;
  if (twice) parts.push(words("{count} saved twice", { count: twice }));
  if (earlier_files_left_out) parts.push(words("earlier left out"));
  return parts.join(" · ");
}

/**
 * @param {any} answer chart_json of nodes/ema/live.py
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const heights = densities(answer);
  const top = 1.16 * Math.max(...heights, ...(answer.ideal?.[1] ?? [0]));
  const end = answer.steps.at(-1) || 1;
  const floor = height - MARGIN.bottom;
  const x = (time) => MARGIN.left + (time / end) * (width - MARGIN.left - MARGIN.right);
  const y = (density) => floor - (density / top) * (floor - MARGIN.top);
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "braid-ema" },
    ...axes(answer, x, y, { top, end, floor }),
    ...ideal(answer, x, y, floor),
    ...bars(answer, heights, x, y, floor),
    ...centres(answer, x, end, floor),
    ...moments(answer, x, floor),
    ...columns(answer, x, floor),
  );
}

/** Weight per unit of time, so that areas are weights. */
function densities({ weights, borders, steps }) {
  const least = (steps.at(-1) || 1) * 1e-3;
  return weights.map((weight, index) => weight / Math.max(borders[index + 1] - borders[index], least));
}

function axes({ unit }, x, y, { top, end, floor }) {
  return [
    ...ticks(top, 4).flatMap((value) => [
      line(x(0), y(value), x(end), y(value)),
      label(x(0) - 5, y(value) + 3, short(value), { anchor: "end" }),
    ]),
    ...ticks(end, 5).map((value) => label(x(value), floor + 19, short(value, 4), { anchor: "middle" })),
    label(x(end / 2), floor + 33, words("training time ({unit}), T = {end}", { unit: many(unit), end }), { anchor: "middle" }),
    line(x(0), floor, x(end), floor, { stroke: COLOURS.faint }),
  ];
}

function ideal({ ideal }, x, y, floor) {
  if (!ideal) return [];
  const [times, density] = ideal;
  const points = times.map((time, index) => [x(time), y(density[index])]);
  const area = [...points, [x(times.at(-1)), floor], [x(0), floor]];
  return [
    path(area, { fill: COLOURS.second, "fill-opacity": 0.16, "stroke-width": 0 }),
    path(points, { stroke: COLOURS.second, class: "braid-ideal" }),
  ];
}

function bars({ weights, borders }, heights, x, y, floor) {
  return weights.flatMap((weight, index) => {
    const [left, right] = [x(borders[index]), x(borders[index + 1])];
    const bar = svg("rect", {
      class: "braid-weight",
      "data-weight": weight,
      x: left,
      y: y(heights[index]),
      width: Math.max(0.5, right - left - gap(right - left)),
      height: Math.max(0, floor - y(heights[index])),
      fill: COLOURS.bars,
    });
    const decimals = ROOM.find(([pixels]) => right - left >= pixels)?.[1];
    if (decimals == null) return [bar];
    const at = [(left + right) / 2, y(heights[index]) - 4];
    return [bar, label(at[0], at[1], percent(weight, decimals), { anchor: "middle", fill: COLOURS.ink })];
  });
}

function percent(weight, decimals) {
  return `${(100 * weight).toFixed(decimals)} %`;
}

function centres({ centre_of_mass, requested_centre_of_mass }, x, end, floor) {
  const upright = (share, attributes) => line(x(share * end), MARGIN.top, x(share * end), floor, attributes);
  return [
    requested_centre_of_mass == null
      ? null
      : upright(requested_centre_of_mass, { stroke: COLOURS.second, "stroke-dasharray": "1 3" }),
    upright(centre_of_mass, { stroke: COLOURS.line, "stroke-dasharray": "5 3" }),
  ];
}

/** A mark below the axis for each checkpoint, where there is room for as many. */
function moments({ steps }, x, floor) {
  const pixels = x(steps.at(-1)) - x(steps[0]);
  if (pixels < ROOM_FOR_MARKS * (steps.length - 1)) return [];
  return steps.map((step) => line(x(step), floor, x(step), floor + 6, { stroke: COLOURS.ink }));
}

function columns({ weights, borders, files, steps, unit, note }, x, floor) {
  return weights.map((weight, index) => {
    const named = note || unit === "files"; // what is still to come is called after its step
    const when = named ? "" : ` (${one(unit)} ${steps[index]})`;
    const reading = `${said(files[index])}${when}: ${percent(weight, 2)}`;
    return column(x(borders[index]), x(borders[index + 1]), MARGIN.top, floor, reading);
  });
}

/** What training time is counted in. */
function many(unit) {
  if (unit === "epochs") return words("epochs");
  return unit === "steps" ? words("steps") : words("files");
}

function one(unit) {
  if (unit === "epochs") return words("epoch");
  return unit === "steps" ? words("step") : words("file");
}
