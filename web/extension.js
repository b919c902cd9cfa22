// @ts-check
// The only file that touches ComfyUI's front end. A new live chart is one row in CHARTS, one module
// web/<noun>/chart.js that exports draw(), and one function in nodes/live.py's LIVE.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import * as ema from "./ema/chart.js";
import { translateFields } from "./language/tooltips.js";
import { describeNode } from "./live/graph.js";
import { LivePanel } from "./live/panel.js";
import { stepsDownstream } from "./magcache/downstream.js";
import * as magcache from "./magcache/chart.js";
import * as timesteps from "./timesteps/chart.js";

/** node id -> the chart in it. @type {Record<string, {noun: string, draw: Function, height: number, extra?: Function}>} */
const CHARTS = {
  BraidMagCache: { noun: "magcache", draw: magcache.draw, height: 190, extra: stepsDownstream },
  BraidMagCachePlan: { noun: "magcache", draw: magcache.draw, height: 190 },
  BraidTimestepSampling: { noun: "timesteps", draw: timesteps.draw, height: 210 },
  BraidTimestepPreview: { noun: "timesteps", draw: timesteps.draw, height: 260 },
  BraidPostHocEma: { noun: "ema", draw: ema.draw, height: 230 },
};

const WIDGET = "braid_live";
const LEAST_WIDTH = 380;

/** POST /braid/live/<noun>; the answer is the JSON that draw() takes. */
async function ask(noun, body) {
  const response = await api.fetchApi(`/braid/live/${noun}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
  });
  return response.json();
}

/** The node as the server asks for it; `extra` adds what only the rest of the graph can tell. */
function described(node, extra) {
  const body = describeNode(node);
  return extra ? { ...body, values: { ...body.values, ...extra(node) } } : body;
}

/** Put a live chart at the end of the node. */
function addChart(node, { noun, draw, height, extra }) {
  const panel = new LivePanel({
    draw,
    observe: () => JSON.stringify(described(node, extra)),
    ask: (body) => ask(noun, body),
  });
  const widget = node.addDOMWidget(WIDGET, "BRAID_LIVE", panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getValue: () => "",
  });
  widget.serialize = false;
  panel.element.style.minHeight = `${height}px`;
  const [width, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, LEAST_WIDTH), Math.max(node.size[1], tall)]);

  const { onAdded, onRemoved, onExecuted } = node;
  node.onAdded = function (...args) {
    onAdded?.apply(this, args);
    panel.start();
  };
  node.onRemoved = function (...args) {
    panel.stop();
    onRemoved?.apply(this, args);
  };
  node.onExecuted = function (output, ...args) {
    onExecuted?.call(this, output, ...args);
    if (output?.braid_live) panel.show(output.braid_live[0]);
  };
  panel.start();
}

app.registerExtension({
  name: "Braid.LiveCharts",
  nodeCreated(node) {
    const chart = CHARTS[node.comfyClass];
    if (chart) addChart(node, chart);
  },
});

/** Our texts in the user's language; English ones come with the nodes. @type {Record<string, any>} */
let texts = {};

app.registerExtension({
  name: "Braid.Tooltips",
  async init() {
    const language = app.ui.settings.getSettingValue("Comfy.Locale");
    const translations = await api.getCustomNodesI18n().catch(() => ({}));
    texts = translations[language]?.nodeDefs ?? {};
  },
  nodeCreated(node) {
    if (node.comfyClass in texts) translateFields(node, texts[node.comfyClass]);
  },
});
