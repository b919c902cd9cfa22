// @ts-check
// The only file that touches ComfyUI's front end. A new live chart is one row in CHARTS, one module
// web/<noun>/chart.js that exports name, heading() and draw(), and one row in LIVE of nodes/__init__.py.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import * as ema from "./ema/chart.js";
import { renewLists } from "./files/lists.js";
import { speak, words } from "./language/texts.js";
import { translateFields } from "./language/tooltips.js";
import { describeNode, everyNode } from "./live/graph.js";
import { LivePanel } from "./live/panel.js";
import { stepsDownstream } from "./magcache/downstream.js";
import * as magcache from "./magcache/chart.js";
import * as timesteps from "./timesteps/chart.js";

/**
 * node id -> the chart in it. `extra` adds what only the rest of the graph can tell; `liveWins`:
 * what a run answers is shown only where the live answer is a sentence.
 * @type {Record<string, {noun: string, chart: import("./live/face.js").Chart, height: number, extra?: Function, liveWins?: boolean}>}
 */
const CHARTS = {
  BraidMagCache: { noun: "magcache", chart: magcache, height: 190, extra: stepsDownstream, liveWins: true },
  BraidMagCachePlan: { noun: "magcache", chart: magcache, height: 190 },
  BraidTimestepSampling: { noun: "timesteps", chart: timesteps, height: 210 },
  BraidTimestepPreview: { noun: "timesteps", chart: timesteps, height: 260 },
  BraidPostHocEma: { noun: "ema", chart: ema, height: 230 },
};

/** Nodes that show a picture while they run and answer one at the end. */
const PICTURED = ["BraidTrainLora"];

const WIDGET = "braid_live";
const LEAST_WIDTH = 380;
const panels = new WeakMap();
/** Tells this page's panels from those of other pages, which the server may answer at once. */
const PAGE = Math.random().toString(36).slice(2);
let panelCount = 0;

/** POST /braid/live/<noun>; the answer is the JSON that the chart takes. `panel`: who asks, of this page. */
async function ask(noun, panel, body, signal) {
  try {
    const response = await api.fetchApi(`/braid/live/${noun}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "Braid-Panel": `${PAGE} ${panel}` },
      body,
      signal,
    });
    if (response.headers.get("Content-Type")?.includes("json")) return await response.json();
    const { status } = response;
    return { message: words("The ComfyUI server answers {status} to this chart; asking again soon.", { status }), again: true };
  } catch {
    return { message: words("Waiting for the ComfyUI server…"), again: true };
  }
}

/** The node as the server asks for it. */
function described(node, extra) {
  const body = describeNode(node);
  return extra ? { ...body, values: { ...body.values, ...extra(node) } } : body;
}

/** A node's key in what the front end keeps of runs: its id, in a subgraph after the subgraph's. */
function placeOf({ id, graph }) {
  return !graph || graph === graph.rootGraph ? String(id) : `${graph.id}:${id}`;
}

/** The panel of the node that the shown graph has in place of this one; null while it is this one. */
function heirOf(node) {
  const now = app.canvas.graph?.getNodeById(node.id);
  return now && now !== node ? (panels.get(now)?.element ?? null) : null;
}

/**
 * Put a live chart at the end of the node.
 * @param {any} node
 * @param {{noun: string, chart: any, height: number, extra?: Function, liveWins?: boolean}} what
 */
function addChart(node, { noun, chart, height, extra, liveWins }) {
  const number = ++panelCount;
  const panel = new LivePanel({
    chart,
    observe: () => JSON.stringify(described(node, extra)),
    ask: (body, signal) => ask(noun, number, body, signal),
    place: () => `${node.graph?.rootGraph.id} ${placeOf(node)}`,
    heir: () => heirOf(node),
  });
  const widget = node.addDOMWidget(WIDGET, "BRAID_LIVE", panel.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true, // the properties panel would list its name and nothing below it
    getMinHeight: () => height,
    getValue: () => "",
  });
  widget.serialize = false;
  panel.element.style.minHeight = `${height}px`;
  const [width, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, LEAST_WIDTH), Math.max(node.size[1], tall)]);
  passMouseOn(panel.element);

  const { onExecuted } = node;
  node.onExecuted = function (output, ...args) {
    onExecuted?.call(this, output, ...args);
    if (output?.braid_live) panel.ran(output.braid_live[0], liveWins);
  };
  panels.set(node, panel);
}

/**
 * Where LiteGraph draws the nodes, a DOM widget lies over the canvas and swallows the mouse. The
 * canvas gets the wheel, the middle and the right button back: zoom, pan and the node's menu work
 * on the chart as beside it. (The left button is the front end's own: it selects the node.)
 */
function passMouseOn(element) {
  const pass = (name, handle) =>
    element.addEventListener(name, (event) => {
      if (!LiteGraph.vueNodesMode) handle(event);
    });
  pass("wheel", (event) => app.canvas.processMouseWheel(event));
  pass("pointerdown", (event) => event.button && app.canvas.processMouseDown(event));
  pass("contextmenu", (event) => event.preventDefault());
}

/**
 * Nodes 2.0 leaves the last picture of a run's progress in the node, and puts the picture that the
 * node answers beside it. The canvas shows only the first of the two; so do we in both.
 */
function showOnePicture(node) {
  Object.defineProperty(node, "hideOutputImages", {
    configurable: true,
    get: () => !!app.nodePreviewImages?.[placeOf(node)]?.length,
    set() {},
  });
}

api.addEventListener("promptQueued", () => {
  for (const node of everyNode(app.rootGraph ?? app.graph)) panels.get(node)?.queued();
});

/** What the server says of a node now: its lists name the files that are there. */
async function definitionOf(type) {
  const response = await api.fetchApi(`/object_info/${type}`);
  return (await response.json())[type];
}

for (const ended of ["execution_success", "execution_interrupted", "execution_error"]) {
  api.addEventListener(ended, () => {
    renewLists(everyNode(app.rootGraph ?? app.graph), definitionOf).catch(() => {}); // the next run, or R, does it
  });
}

app.registerExtension({
  name: "Braid.LiveCharts",
  nodeCreated(node) {
    const chart = CHARTS[node.comfyClass];
    if (chart) addChart(node, chart);
    if (PICTURED.includes(node.comfyClass)) showOnePicture(node);
  },
});

/** The nodes' texts in the user's language; English ones come with the nodes. @type {Record<string, any>} */
let texts = {};

app.registerExtension({
  name: "Braid.Language",
  async init() {
    const language = app.ui.settings.getSettingValue("Comfy.Locale");
    const translations = await api.getCustomNodesI18n().catch(() => ({}));
    texts = translations[language]?.nodeDefs ?? {};
    speak(translations[language]?.braid);
  },
  nodeCreated(node) {
    if (node.comfyClass in texts) translateFields(node, texts[node.comfyClass]);
  },
});
