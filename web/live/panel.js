// @ts-check
// The frame of every live chart: watches, asks, draws. Knows no ComfyUI and no chart.

const LOOK_EVERY_MS = 100;
const RETRY_AFTER_MS = 3000;

const STYLE = `
  .braid-live { width: 100%; height: 100%; overflow: hidden; box-sizing: border-box; display: flex;
    border-radius: 6px; background: color-mix(in srgb, var(--input-text, #ddd) 5%, transparent);
    color: var(--input-text, #ddd); font: 11px/1.35 var(--font-inter, Inter, Arial, sans-serif); }
  .braid-live > svg { flex: 1; min-width: 0; display: block; }
  .braid-live > p { margin: auto; padding: 12px 16px; text-align: center; max-width: 44em;
    overflow: auto; max-height: 100%; box-sizing: border-box; user-select: text; }
  .braid-live > p[role="status"] { color: var(--descrip-text, #999); }
  .braid-live > p[role="alert"] { color: var(--error-text, #ff6b6b); }
`;

/**
 * A DOM element that follows what `observe` says.
 *
 * It looks instead of listening: one short string ten times a second, while it is on screen, sees
 * drags, undo, scripts, links and the coming and going of a dynamic combo's widgets alike, in
 * either renderer, and patches nothing. At most one question is under way, so a drag never queues
 * up work; the last position is always asked for.
 */
export class LivePanel {
  /**
   * @param {object} options
   * @param {() => string} options.observe the question as text; a new text is a new question
   * @param {(question: string) => Promise<any>} options.ask the answer: JSON for `draw`, or
   *   {error} or {message}
   * @param {(answer: any, size: {width: number, height: number}) => SVGElement} options.draw
   */
  constructor({ observe, ask, draw }) {
    this.observe = observe;
    this.ask = ask;
    this.draw = draw;
    this.element = document.createElement("div");
    this.element.className = "braid-live";
    this.answer = null;
    this.question = "";
    this.asking = false;
    this.quietUntil = 0;
    this.timer = 0;
    this.resized = new ResizeObserver(() => this.#render());
  }

  start() {
    if (this.timer) return;
    addStyle();
    this.resized.observe(this.element);
    this.timer = window.setInterval(() => this.#look(), LOOK_EVERY_MS);
  }

  stop() {
    window.clearInterval(this.timer);
    this.timer = 0;
    this.resized.disconnect();
  }

  /** Draw an answer that came another way, such as with a run; it stays until the next change. */
  show(answer) {
    this.answer = answer;
    this.#render();
  }

  async #look() {
    if (this.asking || document.hidden || !this.element.isConnected) return;
    if (performance.now() < this.quietUntil) return;
    const question = this.observe();
    if (question === this.question) return;
    this.asking = true;
    const answer = await this.ask(question).catch(() => null);
    this.asking = false;
    if (answer) this.question = question;
    else this.quietUntil = performance.now() + RETRY_AFTER_MS; // the server is away
    this.show(answer ?? { message: "Waiting for the ComfyUI server…" });
  }

  #render() {
    if (!this.answer) return;
    const { width, height } = this.#size();
    if (width < 1 || height < 1) return;
    const { error, message } = this.answer;
    this.element.replaceChildren(
      error || message
        ? sentence(error ?? message, error ? "alert" : "status")
        : this.draw(this.answer, { width, height }),
    );
  }

  #size() {
    return { width: this.element.clientWidth, height: this.element.clientHeight };
  }
}

function sentence(text, role) {
  const paragraph = document.createElement("p");
  paragraph.setAttribute("role", role);
  paragraph.textContent = text;
  return paragraph;
}

function addStyle() {
  if (document.getElementById("braid-live-style")) return;
  const style = document.createElement("style");
  style.id = "braid-live-style";
  style.textContent = STYLE;
  document.head.append(style);
}
