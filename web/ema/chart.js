// @ts-check
// Weight of each checkpoint over training time as SVG: draws the numbers of nodes/ema.py and
// computes no weight.

import { COLOURS, label, path, svg, ticks } from "../live/svg.js";

const MARGIN = { left: 40, right: 14, top: 52, bottom: 46 };
const ROOM = [[36, 1], [24, 0]]; // a bar of so many pixels has room for a percentage of so many decimals

/**
 * @param {any} answer chart_json of nodes/ema.py
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "braid-ema" });
  const heights = densities(answer);
  const top = 1.16 * Math.max(...heights, ...(answer.ideal?.[1] ?? [0]));
  const end = answer.steps.at(-1) || 1;
  const floor = height - MARGIN.bottom;
  const x = (time) => MARGIN.left + (time / end) * (width - MARGIN.left - MARGIN.right);
  const y = (density) => floor - (density / top) * (floor - MARGIN.top);
  root.append(
    label(MARGIN.left, 17, title(answer), { fill: COLOURS.ink, size: 12, weight: 600 }),
    label(MARGIN.left, 31, subtitle(answer), { size: 9.5 }),
    ...legend(answer),
    ...axes(answer, x, y, { top, end, floor }),
    ...ideal(answer, x, y, floor),
    ...bars(answer, heights, x, y, floor),
    ...centres(answer, x, end, floor),
    ...moments(answer, x, floor),
  );
  return root;
}

/** Weight per unit of time, so that areas are weights. */
function densities({ weights, borders, steps }) {
  const least = (steps.at(-1) || 1) * 1e-3;
  return weights.map((weight, index) => weight / Math.max(borders[index + 1] - borders[index], least));
}

function title({ steps, sigma_rel, requested_sigma_rel }) {
  const asked = requested_sigma_rel == null ? "" : `, requested ${requested_sigma_rel.toFixed(3)}`;
  const files = steps.length === 1 ? "1 checkpoint" : `${steps.length} checkpoints`;
  return `${files}: sigma_rel ${sigma_rel.toFixed(3)}${asked}`;
}

function subtitle({ note, order_from, centre_of_mass, duplicates_left_out, earlier_files_left_out }) {
  const parts = [`centre of mass ${centre_of_mass.toFixed(3)} T`];
  parts.push(note || `order: ${order_from}`);
  if (duplicates_left_out.length) parts.push(`${duplicates_left_out.length} saved twice`);
  if (earlier_files_left_out) parts.push("earlier left out");
  return parts.join(" · ");
}

function legend({ ideal }) {
  const entries = [["weight (area)", COLOURS.line], ideal && ["ideal profile", COLOURS.second]].filter(Boolean);
  return entries.map(([text, fill], index) =>
    label(MARGIN.left + 90 * index, 44, text, { fill, size: 9.5, weight: 600 }),
  );
}

function axes({ unit }, x, y, { top, end, floor }) {
  const line = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2, stroke: COLOURS.grid });
  return [
    ...ticks(top, 4).flatMap((value) => [
      line(x(0), y(value), x(end), y(value)),
      label(x(0) - 5, y(value) + 3, String(+value.toPrecision(2)), { anchor: "end", size: 9 }),
    ]),
    ...ticks(end, 5).map((value) =>
      label(x(value), floor + 19, String(+value.toPrecision(4)), { anchor: "middle", size: 9 }),
    ),
    label(x(end / 2), floor + 34, `training time (${unit}), T = ${end}`, { anchor: "middle", size: 9.5 }),
    svg("line", { x1: x(0), y1: floor, x2: x(end), y2: floor, stroke: COLOURS.faint }),
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

function bars({ weights, borders, files }, heights, x, y, floor) {
  return weights.flatMap((weight, index) => {
    const [left, right] = [x(borders[index]), x(borders[index + 1])];
    const share = (decimals) => `${(100 * weight).toFixed(decimals)} %`;
    const bar = svg(
      "rect",
      {
        class: "braid-weight",
        "data-weight": weight,
        x: left,
        y: y(heights[index]),
        width: Math.max(1, right - left - 1),
        height: Math.max(0, floor - y(heights[index])),
        fill: COLOURS.bars,
      },
      svg("title", {}, `${files[index]}: ${share(2)}`),
    );
    const decimals = ROOM.find(([pixels]) => right - left >= pixels)?.[1];
    if (decimals == null) return [bar];
    const at = [(left + right) / 2, y(heights[index]) - 4];
    return [bar, label(at[0], at[1], share(decimals), { anchor: "middle", size: 9, fill: COLOURS.ink })];
  });
}

function centres({ centre_of_mass, requested_centre_of_mass }, x, end, floor) {
  const line = (share, stroke, dashes) =>
    svg("line", { x1: x(share * end), x2: x(share * end), y1: MARGIN.top, y2: floor, stroke, "stroke-dasharray": dashes });
  return [
    requested_centre_of_mass == null ? null : line(requested_centre_of_mass, COLOURS.second, "1 3"),
    line(centre_of_mass, COLOURS.line, "5 3"),
  ].filter(Boolean);
}

/** A tick below the axis for each checkpoint. */
function moments({ steps }, x, floor) {
  return steps.map((step) =>
    svg("line", { x1: x(step), x2: x(step), y1: floor, y2: floor + 6, stroke: COLOURS.ink }),
  );
}
