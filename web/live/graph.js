// @ts-check
// A node of the open graph as plain data for POST /braid/live/<noun>. Reads nodes, imports nothing.

const PREFIX = "Braid";
const DEEPEST = 16;
const NEVER = 2; // the mode of a muted node
const BYPASS = 4;

/** Virtual node that led nowhere -> the state it was in: some complain on screen, each time they are asked. */
const nowhere = new WeakMap();

/**
 * A node's widgets and what is linked to its inputs: Braid nodes, null for others, which only a run can know.
 * @returns {{node_id: string, values: Record<string, any>, inputs: Record<string, any>}}
 */
export function describeNode(node, depth = 0) {
  const values = {};
  for (const widget of node.widgets ?? []) {
    if (widget.serialize !== false && widget.type !== "button") values[widget.name] = valueOf(node, widget.name);
  }
  const inputs = {};
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    const source = input.widget || depth > DEEPEST ? null : sourceOf(node, slot)?.node;
    if (source) inputs[input.name] = source.comfyClass?.startsWith(PREFIX) ? describeNode(source, depth + 1) : null;
  }
  return { node_id: node.comfyClass, values, inputs };
}

/** A widget's value, its own or that of a linked primitive; null where only a run can know it. */
export function valueOf(node, name, depth = 0) {
  const own = node.widgets?.find((widget) => widget.name === name)?.value;
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  const source = slot < 0 ? null : sourceOf(node, slot);
  if (!source) return own;
  const value = depth > DEEPEST ? null : valueOf(source.node, source.widget, depth + 1);
  return typeof value === typeof own ? value : null;
}

/**
 * What feeds an input slot, through reroutes and other virtual nodes, bypassed nodes and in and out
 * of subgraphs: a node and the widget whose value it hands on, null when it is no such node. The
 * trail gets every node on the way. Null where nothing feeds it.
 * @returns {{node: any, widget: string | null} | null}
 */
export function sourceOf(node, slot, trail = []) {
  const link = node?.graph?.getLink?.(node.inputs?.[slot]?.link) ?? broadcastTo(node, slot);
  if (!link || trail.length > DEEPEST) return null;
  const origin = node.graph.getNodeById(link.origin_id);
  return origin ? outputOf(origin, link.origin_slot, trail) : outsideOf(node.graph, link.origin_slot, trail);
}

/** The link that the pack Use Everywhere notes in the graph and adds while it is queued. */
function broadcastTo(node, slot) {
  const fits = ({ downstream, downstream_slot }) => downstream == node.id && downstream_slot === slot;
  const link = node?.graph?.extra?.ue_links?.find(fits);
  return link && { origin_id: link.upstream, origin_slot: Number(link.upstream_slot) };
}

/** What an output of a node hands on. */
function outputOf(node, slot, trail) {
  trail.push(node);
  if (node.mode === NEVER) return null;
  if (node.mode === BYPASS) return sourceOf(node, passedThrough(node, slot), trail);
  if (node.type === "PrimitiveNode") return { node, widget: node.widgets?.[0]?.name ?? null };
  if (!node.subgraph && node.isVirtualNode) return aliasOf(node, slot, trail);
  if (!node.subgraph) return { node, widget: isConstant(node) ? "value" : null };
  const link = node.subgraph.getLink?.(node.subgraph.outputs?.[slot]?.linkIds?.[0]);
  const inner = link && node.subgraph.getNodeById(link.origin_id);
  return inner ? outputOf(inner, link.origin_slot, trail) : null;
}

/** Whether `value` is all there is to a node: with a minimum or a factor beside it the output is another number. */
function isConstant(node) {
  const value = node.widgets?.find((widget) => widget.name === "value");
  return !!value && node.widgets.every((each) => each === value || value.linkedWidgets?.includes(each));
}

/** What a node that is never queued (a reroute, the Get of a Set) stands for; the front end asks it the same. */
function aliasOf(node, slot, trail) {
  const { lastNodeId, lastLinkId } = node.graph.rootGraph.state;
  const state = JSON.stringify([lastNodeId, lastLinkId, node.widgets?.map((widget) => widget.value)]);
  if (nowhere.get(node) === state) return null;
  const other = node.resolveVirtualOutput?.(slot);
  if (other) return outputOf(other.node, other.slot, trail);
  const link = node.getInputLink(slot);
  if (!link) nowhere.set(node, state);
  return link ? sourceOf(node.graph.getNodeById(link.target_id), link.target_slot, trail) : null;
}

/** The input that a bypassed node hands on as an output: the same slot, else the first of its type. */
function passedThrough(node, slot) {
  const { type } = node.outputs[slot];
  const inputs = node.inputs ?? [];
  return inputs[slot]?.type === type ? slot : inputs.findIndex((input) => input.type === type);
}

/** What feeds input `slot` of the subgraph node that holds `graph`. */
function outsideOf(graph, slot, trail) {
  const holder = holderOf(graph);
  const source = sourceOf(holder, slot, trail);
  const input = holder?.inputs?.[slot];
  if (source || input?.link != null) return source;
  return input?.widget ? { node: holder, widget: input.widget.name } : null;
}

/** Every input of the graphs around and beside `node`: whose it is, and all nodes that feed it or pass it on. */
export function flowsAround(node) {
  return everyNode(node.graph?.rootGraph)
    .filter((target) => !target.subgraph)
    .flatMap((target) => (target.inputs ?? []).map((_, slot) => ({ target, trail: trailTo(target, slot) })));
}

function trailTo(node, slot) {
  const trail = [];
  sourceOf(node, slot, trail);
  return trail;
}

/** The node that shows a subgraph in the graph around it. */
function holderOf(graph) {
  return everyNode(graph.rootGraph).find((each) => each.subgraph === graph);
}

/** All nodes of a graph and of the subgraphs in it. */
export function everyNode(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? everyNode(node.subgraph) : [])]);
}
