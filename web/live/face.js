// @ts-check
// What a live chart looks like: a heading, a plot with a cursor over its columns, or a sentence.
// Knows no ComfyUI, no server and no chart.

import { said, words } from "../language/texts.js";
import { COLOURS } from "./svg.js";

const KEYS = {
  ArrowLeft: -1,
  ArrowRight: 1,
  ArrowDown: -1,
  ArrowUp: 1,
  PageDown: -10,
  PageUp: 10,
  Home: -Infinity,
  End: Infinity,
};
const SLIDER = ["tabindex", "role", "aria-label", "aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext"];

const STYLE = `
  .braid-live { position: relative; width: 100%; height: 100%; overflow: hidden; box-sizing: border-box;
    display: flex; flex-direction: column; border-radius: 6px; color: ${COLOURS.ink};
    background: color-mix(in srgb, ${COLOURS.ink} 5%, transparent);
    font: 10.5px/1.35 var(--font-inter, Inter, Arial, sans-serif); }
  .braid-live:focus { outline: none; }
  .braid-live:focus-visible { outline: 2px solid ${COLOURS.line}; outline-offset: -2px; }
  .braid-live.braid-waiting > * { opacity: 0.45; }
  .braid-live.braid-waiting::after { content: attr(data-waiting); }
  .braid-live > header { flex: none; padding: 6px 12px 0; color: ${COLOURS.faint}; }
  .braid-live > header > div { overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
  .braid-live > header > .braid-title { color: ${COLOURS.ink}; font-size: 12px; font-weight: 600; }
  .braid-live > header > .braid-legend { display: flex; flex-wrap: wrap; column-gap: 12px; }
  .braid-legend i { display: inline-block; box-sizing: border-box; width: 12px; margin-right: 4px; }
  .braid-plot { flex: 1; min-height: 0; position: relative; }
  .braid-plot > svg { position: absolute; inset: 0; width: 100%; height: 100%; }
  .braid-column { fill: transparent; }
  .braid-column.braid-on { fill: color-mix(in srgb, ${COLOURS.ink} 18%, transparent); }
  .braid-live > .braid-note { flex: none; margin: 0; padding: 0 12px 4px; color: ${COLOURS.second}; }
  .braid-live > .braid-reading, .braid-live.braid-waiting::after { position: absolute; inset: auto 2px 2px;
    padding: 0 8px; text-align: center;
    pointer-events: none; color: ${COLOURS.ink}; background: var(--comfy-menu-bg, #222);
    border-top: 1px solid var(--border-color, #4e4e4e); }
  .braid-live > .braid-reading:empty { display: none; }
  .braid-live > p.braid-sentence { margin: auto; padding: 12px 16px; text-align: center; max-width: 44em;
    overflow: auto; max-height: 100%; box-sizing: border-box; user-select: text; font-size: 11px; color: ${COLOURS.faint}; }
  .braid-live > p.braid-sentence[role="alert"] { color: ${COLOURS.error}; }
`;

/** @typedef {{title: string, subtitle: string, legend: [string, string, string][], note?: string}} Heading */
/** @typedef {{name: () => string, heading: (answer: any) => Heading, draw: (answer: any, size: {width: number, height: number}) => SVGElement}} Chart */

/**
 * The element of one chart.
 *
 * To a screen reader it is a slider: its label is the chart in a sentence, the arrow keys move
 * over the columns, and the column's sentence is its value. Only a focus that came by keyboard
 * takes those keys, so that after a click they still move nodes.
 */
export class ChartFace {
  /** @param {Chart} chart */
  constructor(chart) {
    this.chart = chart;
    this.answer = null;
    this.cursor = -1;
    this.element = element("div", "braid-live");
    this.element.dataset.waiting = words("waiting for the server…");
    this.plot = element("div", "braid-plot");
    this.reading = element("div", "braid-reading");
    this.keys = false;
    this.element.addEventListener("focus", () => this.#focused(this.element.matches(":focus-visible")));
    this.element.addEventListener("blur", () => this.#focused(false));
    this.element.addEventListener("keydown", (event) => this.#pressed(event));
    this.element.addEventListener("pointermove", (event) => this.#point(indexOf(event.target)));
    this.element.addEventListener("pointerleave", () => this.#point(-1));
    addStyle();
  }

  /** Show an answer: JSON for the chart, or a sentence, {error} or {message}. */
  show(answer) {
    this.answer = answer;
    const { error, message } = answer;
    if (error || message) this.#say(said(error ?? message), error ? "alert" : "status");
    else this.#frame(this.chart.heading(answer));
    this.resize();
  }

  /** Draw the plot again for the room that it now has. */
  resize() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!this.plot.isConnected || width < 1 || height < 1) return;
    this.plot.replaceChildren(this.chart.draw(this.answer, { width, height }));
    this.#point(this.cursor);
  }

  /** Dim what is shown while a newer answer is waited for. */
  wait(waiting) {
    this.element.classList.toggle("braid-waiting", waiting);
    this.element.setAttribute("aria-busy", String(waiting));
  }

  #say(text, role) {
    const sentence = this.element.querySelector(":scope > p.braid-sentence");
    if (sentence?.textContent === text && sentence.getAttribute("role") === role) return;
    const paragraph = element("p", "braid-sentence", text);
    paragraph.setAttribute("role", role);
    this.element.replaceChildren(paragraph);
    for (const name of SLIDER) this.element.removeAttribute(name);
  }

  /** @param {Heading} heading */
  #frame({ title, subtitle, legend, note }) {
    const header = element("header", "");
    header.append(element("div", "braid-title", title), element("div", "braid-subtitle", subtitle), keyOf(legend));
    const parts = [header, this.plot, note ? element("p", "braid-note", note) : null, this.reading];
    this.element.replaceChildren(...parts.filter((part) => part != null));
    const whole = [`${this.chart.name()}, ${title}`, subtitle, note].filter(Boolean).join(". ");
    this.element.setAttribute("tabindex", "0");
    this.element.setAttribute("role", "slider");
    this.element.setAttribute("aria-label", spoken(whole));
  }

  #focused(byKeyboard) {
    this.keys = byKeyboard;
    if (!byKeyboard) this.cursor = -1;
    this.#point(this.cursor);
  }

  #pressed(event) {
    const move = KEYS[event.key];
    if (!this.keys || !move || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    const last = this.#columns().length - 1;
    const start = this.cursor < 0 && move < 0 ? last + 1 : this.cursor;
    this.#point(Math.max(0, Math.min(last, start + move)));
  }

  /** Put the cursor on a column; -1 takes it away. */
  #point(index) {
    const columns = this.#columns();
    this.cursor = index < columns.length ? index : -1;
    for (const [each, rect] of columns.entries()) rect.classList.toggle("braid-on", each === this.cursor);
    const text = columns[this.cursor]?.dataset.reading;
    const hint = words("arrow keys read the chart, column by column");
    this.reading.textContent = text ?? (this.keys && columns.length ? hint : "");
    this.element.setAttribute("aria-valuemin", "0");
    this.element.setAttribute("aria-valuemax", String(columns.length));
    this.element.setAttribute("aria-valuenow", String(this.cursor + 1));
    this.element.setAttribute("aria-valuetext", spoken(text ?? hint));
  }

  /** @returns {SVGElement[]} */
  #columns() {
    return [...this.plot.querySelectorAll(".braid-column")];
  }
}

/** A text without the dots between its parts, which a screen reader would read out. */
function spoken(text) {
  return text.replaceAll(" · ", ", ");
}

/** Index of a column among its siblings; -1 for anything else. */
function indexOf(target) {
  if (!target.classList?.contains("braid-column")) return -1;
  return [...target.parentNode.querySelectorAll(".braid-column")].indexOf(target);
}

/** The legend: [text, colour, "bar" | "line" | "dashed"] each. */
function keyOf(legend) {
  const row = element("div", "braid-legend");
  for (const [text, colour, kind] of legend) {
    const swatch = element("i", "");
    if (kind === "bar") Object.assign(swatch.style, { height: "8px", background: colour });
    else swatch.style.borderTop = `2px ${kind === "dashed" ? "dashed" : "solid"} ${colour}`;
    if (kind !== "bar") swatch.style.verticalAlign = "0.3em";
    const item = element("span", "");
    item.append(swatch, text);
    row.append(item);
  }
  return row;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function addStyle() {
  if (document.getElementById("braid-live-style")) return;
  const style = element("style", "", STYLE);
  style.id = "braid-live-style";
  document.head.append(style);
}
