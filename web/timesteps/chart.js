// @ts-check
// The timestep preview as SVG: draws the numbers of nodes/timesteps/nodes.py and computes no distribution.

import { said, words } from "../language/texts.js";
import { COLOURS, clipped, column, gap, label, line, path, short, svg, ticks } from "../live/svg.js";

const MARGIN = { left: 36, right: 12, top: 22, bottom: 32 };
const LOSS_SHARE = 0.34;
const LOSS_GAP = 24;

export const name = () => words("Timestep distribution");

/** What stands above the plot. @param {any} answer chart_json of nodes/timesteps/nodes.py */
export function heading({ title, subtitle, effective, run }) {
  const legend = [
    [words("drawn"), COLOURS.bars, "bar"],
    [words("density"), COLOURS.line, "line"],
    effective && [words("density × loss weight"), COLOURS.second, "dashed"],
    run && [words("drawn by the run ({count})", { count: run.samples }), COLOURS.third, "line"],
  ];
  return {
    title: title.map(said).join(", "),
    subtitle: subtitle.map(said).join(" · "),
    legend: legend.filter(Boolean),
  };
}

/**
 * @param {any} answer chart_json of nodes/timesteps/nodes.py
 * @param {{width: number, height: number}} size in CSS pixels
 */
export function draw(answer, { width, height }) {
  const bottom = height - MARGIN.bottom;
  const split = answer.run ? bottom - LOSS_SHARE * (bottom - MARGIN.top) : bottom;
  const x = (t) => MARGIN.left + t * (width - MARGIN.left - MARGIN.right);
  const top = highest(answer);
  const y = (value) => split - (value / top) * (split - MARGIN.top);
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "braid-timesteps" },
    ...outside(answer.range, x, bottom),
    ...axes(x, y, top, split, bottom),
    ...bars(answer, x, y, split),
    clipped(width, MARGIN.top, split + 1, curves(answer, x, y)),
    ...(answer.run ? lossPanel(answer, x, split + LOSS_GAP, bottom) : []),
    ...columns(answer, x, bottom),
  );
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

/** Shades what the range leaves out. */
function outside([low, high], x, bottom) {
  return [[0, low], [high, 1]]
    .filter(([start, end]) => end > start)
    .map(([start, end]) =>
      svg("rect", { x: x(start), y: MARGIN.top, width: x(end) - x(start), height: bottom - MARGIN.top, fill: COLOURS.grid, opacity: 0.5 }),
    );
}

function axes(x, y, top, split, bottom) {
  return [
    ...ticks(top, 4).flatMap((value) => [
      line(x(0), y(value), x(1), y(value)),
      label(x(0) - 5, y(value) + 3, short(value), { anchor: "end" }),
    ]),
    ...[0, 0.2, 0.4, 0.6, 0.8, 1].flatMap((value) => [
      line(x(value), MARGIN.top, x(value), bottom),
      label(x(value), bottom + 12, value.toFixed(1), { anchor: "middle" }),
    ]),
    label(x(0.5), bottom + 26, words("noise level t   (1 = pure noise)"), { anchor: "middle" }),
    ...logSnr(x(1) - x(0)).flatMap((snr) => {
      const at = x(1 / (1 + Math.exp(snr / 2)));
      const text = snr === 0 ? "log-SNR 0" : `${snr > 0 ? "+" : "−"}${Math.abs(snr)}`;
      return [
        line(at, MARGIN.top - 4, at, MARGIN.top, { stroke: COLOURS.faint }),
        label(at, MARGIN.top - 7, text, { anchor: "middle" }),
      ];
    }),
    line(x(0), split, x(1), split, { stroke: COLOURS.faint }),
  ];
}

/** The values of log-SNR whose labels have room on an axis of so many pixels. */
function logSnr(pixels) {
  const least = pixels > 220 ? 2 : 4;
  const most = pixels > 300 ? 8 : 4;
  return [8, 4, 2, 0, -2, -4, -8].filter((snr) => snr === 0 || (Math.abs(snr) >= least && Math.abs(snr) <= most));
}

function bars({ statistics }, x, y, split) {
  const { bins, counts } = statistics;
  const heights = densities(statistics, counts);
  const width = x(bins[1]) - x(bins[0]);
  return counts.map((count, index) =>
    svg("rect", {
      class: "braid-bin",
      "data-count": count,
      x: x(bins[index]),
      y: y(heights[index]),
      width: Math.max(0.5, width - gap(width)),
      height: Math.max(0, split - y(heights[index])),
      fill: COLOURS.bars,
    }),
  );
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

/** The run's loss in each bin, with its standard error. */
function lossPanel({ statistics, run }, x, top, bottom) {
  const { bins } = statistics;
  const most = 1.1 * Math.max(...run.loss.map((loss, index) => (loss ?? 0) + (run.loss_error[index] ?? 0)), 1e-12);
  const y = (value) => bottom - (Math.max(0, value) / most) * (bottom - top);
  const dots = run.loss.flatMap((loss, index) => {
    if (loss == null) return [];
    const [at, error] = [x(0.5 * (bins[index] + bins[index + 1])), run.loss_error[index] ?? 0];
    return [
      line(at, y(loss - error), at, y(loss + error), { stroke: COLOURS.third }),
      svg("circle", { cx: at, cy: y(loss), r: 2.2, fill: COLOURS.third }),
    ];
  });
  return [
    ...dots,
    line(x(0), bottom, x(1), bottom, { stroke: COLOURS.faint }),
    label(x(0) - 5, top + 6, short(most, 2), { anchor: "end" }),
    label(x(0), top - 8, words("loss of the run, mean ± standard error")),
  ];
}

function columns(answer, x, bottom) {
  const { bins, counts } = answer.statistics;
  return counts.map((_, index) => column(x(bins[index]), x(bins[index + 1]), MARGIN.top, bottom, reading(answer, index)));
}

function reading({ statistics, run }, index) {
  const { bins, counts, samples } = statistics;
  const share = ((100 * counts[index]) / samples).toFixed(2);
  const [low, high] = [bins[index].toFixed(3), bins[index + 1].toFixed(3)];
  const planned = words("t {low} to {high}: {count} draws, {share} %", { low, high, count: counts[index], share });
  if (!run) return planned;
  const { loss, loss_error, samples: all } = run;
  const ran = words("the run drew {count} of {all}", { count: run.counts[index], all });
  if (loss[index] == null) return `${planned} · ${ran}`;
  const error = loss_error[index] == null ? "" : ` ± ${short(loss_error[index], 2)}`;
  return `${planned} · ${ran} · ${words("loss {loss}", { loss: `${short(loss[index])}${error}` })}`;
}
