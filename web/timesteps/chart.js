// @ts-check
// The timestep preview as SVG: draws the numbers of nodes/timesteps.py and computes no distribution.

import { COLOURS, label, path, svg, ticks } from "../live/svg.js";

const MARGIN = { left: 34, right: 14, top: 60, bottom: 32 };
const LEGEND_LINE = 14;
const LOG_SNR = [8, 4, 2, 0, -2, -4, -8];
const LOSS_SHARE = 0.34;
const LOSS_GAP = 20;

/**
 * @param {any} answer chart_json of nodes/timesteps.py
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "braid-timesteps" });
  const entries = legend(answer);
  const roof = MARGIN.top + (entries.length ? LEGEND_LINE : 0);
  const bottom = height - MARGIN.bottom;
  const split = answer.run ? bottom - LOSS_SHARE * (bottom - roof) : bottom;
  const x = (t) => MARGIN.left + t * (width - MARGIN.left - MARGIN.right);
  const top = highest(answer);
  const y = (value) => split - (Math.min(value, top) / top) * (split - roof);
  root.append(
    label(MARGIN.left, 17, answer.title, { fill: COLOURS.ink, size: 12, weight: 600 }),
    label(MARGIN.left, 31, answer.subtitle, { size: 9.5 }),
    ...entries,
    ...outside(answer.range, x, roof, bottom),
    ...axes(x, y, top, { roof, split, bottom }),
    ...bars(answer, x, y, split),
    ...curves(answer, x, y),
  );
  if (answer.run) root.append(...lossPanel(answer, x, split + LOSS_GAP, bottom));
  return root;
}

/** Drawn density of each bin: count / samples / width of a bin. */
function densities({ bins, samples }, counts) {
  const width = bins[1] - bins[0];
  return counts.map((count) => count / samples / width);
}

function highest({ statistics, density, effective, run }) {
  const drawn = Math.max(...densities(statistics, statistics.counts));
  const lines = Math.max(...density, ...(effective ?? [0]));
  const ran = run ? Math.max(...densities({ ...statistics, samples: run.samples }, run.counts)) : 0;
  return 1.08 * Math.max(drawn, ran, Math.min(lines, 1.6 * drawn));
}

function outside([low, high], x, top, bottom) {
  return [[0, low], [high, 1]]
    .filter(([start, end]) => end > start)
    .map(([start, end]) =>
      svg("rect", { x: x(start), y: top, width: x(end) - x(start), height: bottom - top, fill: COLOURS.grid, opacity: 0.5 }),
    );
}

function axes(x, y, top, { roof, split, bottom }) {
  const line = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2, stroke: COLOURS.grid });
  const t = [0, 0.2, 0.4, 0.6, 0.8, 1];
  const shown = LOG_SNR.filter((snr) => x(1) - x(0) > 300 || Math.abs(snr) < 8);
  return [
    ...ticks(top, 4).flatMap((value) => [
      line(x(0), y(value), x(1), y(value)),
      label(x(0) - 5, y(value) + 3, String(+value.toPrecision(3)), { anchor: "end", size: 9 }),
    ]),
    ...t.flatMap((value) => [
      line(x(value), roof, x(value), bottom),
      label(x(value), bottom + 12, value.toFixed(1), { anchor: "middle", size: 9 }),
    ]),
    label(x(0.5), bottom + 25, "noise level t   (1 = pure noise)", { anchor: "middle", size: 9.5 }),
    ...shown.flatMap((snr) => {
      const at = x(1 / (1 + Math.exp(snr / 2)));
      const text = snr === 0 ? "log-SNR 0" : `${snr > 0 ? "+" : "−"}${Math.abs(snr)}`;
      return [
        svg("line", { x1: at, y1: roof - 4, x2: at, y2: roof, stroke: COLOURS.faint }),
        label(at, roof - 7, text, { anchor: "middle", size: 9 }),
      ];
    }),
    svg("line", { x1: x(0), y1: split, x2: x(1), y2: split, stroke: COLOURS.faint }),
  ];
}

function bars({ statistics, run }, x, y, split) {
  const { bins, counts, samples } = statistics;
  const heights = densities(statistics, counts);
  return counts.map((count, index) => {
    const [left, right] = [x(bins[index]), x(bins[index + 1])];
    const share = ((100 * count) / samples).toFixed(2);
    const ran = run ? `; the run drew ${run.counts[index]} of ${run.samples}` : "";
    const text = `t ${bins[index].toFixed(3)} – ${bins[index + 1].toFixed(3)}: ${count} draws, ${share} %${ran}`;
    return svg(
      "rect",
      {
        class: "braid-bin",
        "data-count": count,
        x: left,
        y: y(heights[index]),
        width: Math.max(0.5, right - left - Math.min(1, 0.15 * (right - left))),
        height: Math.max(0, split - y(heights[index])),
        fill: COLOURS.bars,
      },
      svg("title", {}, text),
    );
  });
}

function curves({ t, density, effective, statistics, run }, x, y) {
  const over = (values) => t.map((each, index) => [x(each), y(values[index])]);
  const lines = [path(over(density), { stroke: COLOURS.line, class: "braid-density" })];
  if (effective) lines.push(path(over(effective), { stroke: COLOURS.second, "stroke-dasharray": "5 3" }));
  if (run) {
    const { bins } = statistics;
    const ran = densities({ ...statistics, samples: run.samples }, run.counts);
    const steps = ran.flatMap((value, index) => [[x(bins[index]), y(value)], [x(bins[index + 1]), y(value)]]);
    lines.push(path(steps, { stroke: COLOURS.third, class: "braid-run" }));
  }
  return lines;
}

function legend({ effective, run }) {
  const entries = [
    effective && ["density", COLOURS.line],
    effective && ["density × loss weight", COLOURS.second],
    run && [`drawn by the run (${run.samples})`, COLOURS.third],
  ].filter(Boolean);
  let left = MARGIN.left;
  return entries.map(([text, fill]) => {
    const item = label(left, 45, text, { fill, size: 9.5, weight: 600 });
    left += 5.6 * text.length + 10;
    return item;
  });
}

function lossPanel({ statistics, run }, x, top, bottom) {
  const { bins } = statistics;
  const most = 1.1 * Math.max(...run.loss.map((loss, index) => (loss ?? 0) + (run.loss_error[index] ?? 0)), 1e-12);
  const y = (value) => bottom - (Math.max(0, value) / most) * (bottom - top);
  const dots = run.loss.flatMap((loss, index) => {
    if (loss == null) return [];
    const [at, error] = [x(0.5 * (bins[index] + bins[index + 1])), run.loss_error[index] ?? 0];
    const text = `loss ${loss.toPrecision(3)} ± ${error.toPrecision(2)} of ${run.counts[index]} draws`;
    return [
      svg("line", { x1: at, x2: at, y1: y(loss - error), y2: y(loss + error), stroke: COLOURS.third }),
      svg("circle", { cx: at, cy: y(loss), r: 2.2, fill: COLOURS.third }, svg("title", {}, text)),
    ];
  });
  return [
    ...dots,
    svg("line", { x1: x(0), y1: bottom, x2: x(1), y2: bottom, stroke: COLOURS.faint }),
    label(x(0) - 5, top + 6, most.toPrecision(2), { anchor: "end", size: 9 }),
    label(x(0), top - 7, "loss of the run, mean ± standard error", { size: 9 }),
  ];
}
