// @ts-check
// The clockwork of every live chart: watches, asks, shows. Knows no ComfyUI and no chart.

import { words } from "../language/texts.js";
import { ChartFace } from "./face.js";

const LOOK_EVERY_MS = 100;
const SLOW_AFTER_MS = 700;
const GIVE_UP_AFTER_MS = 60_000;
const RETRY_AFTER_MS = 3000;
const REMEMBERED = 24;
const OFF_SCREEN = "off screen";

/** question -> its last answer: undo and a tab that comes back draw at once, then ask again. */
const remembered = new Map();

/** Place of a node -> what its last run answered, and to which question: undo makes the node anew. */
const runs = new Map();

/** While the server is away: what all panels say, and until when none of them asks. */
const away = { answer: null, until: 0 };

/**
 * A chart that follows what `observe` says.
 *
 * It looks instead of listening: one short string ten times a second, while it is on screen, sees
 * drags, undo, scripts, links and the coming and going of a dynamic combo's widgets alike, in
 * either renderer, and patches nothing. At most one question is under way, so a drag never queues
 * up work; the last position is always asked for. Whether it is on screen its own size tells: a
 * collapsed, removed or copied node has none, so nothing runs for it and nothing has to be undone.
 */
export class LivePanel {
  /**
   * @param {object} options
   * @param {() => string} options.observe the question as text; a new text is a new question
   * @param {(question: string, signal: AbortSignal) => Promise<any>} options.ask the answer: JSON
   *   for the chart, {error} or {message}; `again` in it says that the server is away
   * @param {import("./face.js").Chart} options.chart
   * @param {() => string} options.place what stays the same when the front end makes the node anew
   * @param {() => HTMLElement | null} options.heir the element of the node that has taken the place
   *   of this one's; null while this one's is in it
   */
  constructor({ observe, ask, chart, place, heir }) {
    this.observe = observe;
    this.ask = ask;
    this.place = place;
    this.heir = heir;
    this.face = new ChartFace(chart);
    this.question = "";
    this.queuedAs = null;
    this.timer = 0;
    this.askedAt = 0;
    this.request = new AbortController();
    this.sized = new ResizeObserver(() => this.#resized());
    this.sized.observe(this.face.element);
  }

  /** The DOM element of the panel. */
  get element() {
    return this.face.element;
  }

  /** A run is queued with the widgets as they are. */
  queued() {
    this.queuedAs = this.observe();
  }

  /**
   * An answer that came with a run stands for the question that was queued, not for what the
   * widgets say by now. It is shown instead of the live answer to that question; with `liveWins`
   * only where that is a sentence.
   */
  ran(answer, liveWins = false) {
    keep(runs, this.place(), { question: this.queuedAs ?? this.observe(), answer, liveWins });
    this.question = ""; // look again
  }

  #resized() {
    const onScreen = this.element.clientWidth > 0 && this.element.clientHeight > 0;
    if (onScreen && !this.timer) this.#start();
    if (!onScreen && this.timer) this.#stop();
    this.face.resize();
  }

  #start() {
    this.timer = window.setInterval(() => this.#tick(), LOOK_EVERY_MS);
    this.#tick();
  }

  #stop() {
    window.clearInterval(this.timer);
    this.timer = 0;
    this.request.abort(OFF_SCREEN);
  }

  #tick() {
    if (this.#replaced()) return;
    const waited = this.askedAt && performance.now() - this.askedAt;
    if (waited > GIVE_UP_AFTER_MS) this.request.abort();
    if (waited) this.face.wait(waited > SLOW_AFTER_MS);
    else if (!document.hidden) this.#look();
  }

  /**
   * Nodes 2.0 keeps what it has drawn of a node when undo, or a workflow with a node of the same
   * id, puts another in its place: this panel would stay on screen, and the other's never get there.
   */
  #replaced() {
    const heir = this.heir();
    if (heir && !heir.isConnected) this.element.replaceWith(heir);
    return !!heir;
  }

  async #look() {
    let question = "";
    try {
      question = this.observe();
      if (question === this.question) return;
      if (away.answer && performance.now() < away.until) return this.#answered("", away.answer);
      if (remembered.has(question)) this.#show(question, remembered.get(question));
      const answer = await this.#asked(question);
      if (answer) this.#answered(question, answer);
    } catch (error) {
      this.#answered(question, { error: words("This chart failed: {error}", { error: /** @type {Error} */ (error).message }) });
    }
  }

  /** The answer; null when the panel left the screen meanwhile. */
  async #asked(question) {
    const { signal } = (this.request = new AbortController());
    this.askedAt = performance.now();
    away.until = this.askedAt + RETRY_AFTER_MS; // one panel tries for all
    try {
      const answer = await this.ask(question, signal);
      if (signal.reason === OFF_SCREEN) return null;
      away.answer = answer.again ? answer : null;
      return answer;
    } finally {
      this.askedAt = 0;
      this.face.wait(false);
    }
  }

  #answered(question, answer) {
    this.question = answer.again ? "" : question;
    this.#show(question, answer);
    if (answer.again || answer.error) return;
    keep(remembered, question, answer);
  }

  #show(question, answer) {
    const run = runs.get(this.place());
    const ran = run?.question === question && (!run.liveWins || answer.message);
    this.face.show(ran ? run.answer : answer);
  }
}

/** Note an entry; the oldest is forgotten. */
function keep(map, key, value) {
  map.delete(key);
  map.set(key, value);
  if (map.size > REMEMBERED) map.delete(map.keys().next().value);
}
