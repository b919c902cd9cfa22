// @ts-check
// A node of the open graph as plain data for POST /braid/live/<noun>. Reads nodes, imports nothing.

const PREFIX = "Braid";
const DEEPEST = 16;
const NEVER = 2; // the mode of a muted node
const BYPASS = 4;

/**
 * A node's widgets and the Braid nodes linked to its inputs.
 * @returns {{node_id: string, values: Record<string, any>, inputs: Record<string, any>}}
 */
export function describeNode(node, depth = 0) {
  const values = {};
  for (const widget of node.widgets ?? []) {
    if (widget.serialize !== false && widget.type !== "button") values[widget.name] = valueOf(node, widget.name);
  }
  const inputs = {};
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (input.link == null || input.widget || depth > DEEPEST) continue;
    const source = sourceOf(node, slot)?.node;
    if (source?.comfyClass?.startsWith(PREFIX)) inputs[input.name] = describeNode(source, depth + 1);
  }
  return { node_id: node.comfyClass, values, inputs };
}

/** A widget's value, its own or that of a linked primitive; null where only a run can know it. */
export function valueOf(node, name, depth = 0) {
  const own = node.widgets?.find((widget) => widget.name === name)?.value;
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  if (slot < 0 || node.inputs[slot].link == null) return own;
  if (depth > DEEPEST) return null;
  const source = sourceOf(node, slot);
  if (!source) return own;
  const value = valueOf(source.node, source.widget, depth + 1);
  return typeof value === typeof own ? value : null;
}

/**
 * What feeds an input slot, through reroutes, bypassed nodes and in and out of subgraphs: a node,
 * or a subgraph's own node whose promoted widget it is. Null where nothing does.
 * @returns {{node: any, widget: string} | null}
 */
export function sourceOf(node, slot, depth = 0) {
  const link = node?.graph?.getLink?.(node.inputs?.[slot]?.link);
  if (!link || depth > DEEPEST) return null;
  const origin = node.graph.getNodeById(link.origin_id);
  return origin ? outputOf(origin, link.origin_slot, depth) : outsideOf(node.graph, link.origin_slot, depth);
}

/** What an output of a node hands on. */
function outputOf(node, slot, depth) {
  if (node.mode === NEVER) return null;
  if (node.mode === BYPASS) return sourceOf(node, passedThrough(node, slot), depth + 1);
  if (node.type === "Reroute") return sourceOf(node, 0, depth + 1);
  if (node.type === "PrimitiveNode") return { node, widget: node.widgets?.[0]?.name };
  if (!node.subgraph) return { node, widget: "value" };
  const link = node.subgraph.getLink?.(node.subgraph.outputs?.[slot]?.linkIds?.[0]);
  const inner = link && node.subgraph.getNodeById(link.origin_id);
  return inner ? outputOf(inner, link.origin_slot, depth + 1) : null;
}

/** The input that a bypassed node hands on as an output: the same slot, else the first of its type. */
function passedThrough(node, slot) {
  const { type } = node.outputs[slot];
  const inputs = node.inputs ?? [];
  return inputs[slot]?.type === type ? slot : inputs.findIndex((input) => input.type === type);
}

/** What feeds input `slot` of the subgraph node that holds `graph`. */
function outsideOf(graph, slot, depth) {
  const holder = holderOf(graph);
  const input = holder?.inputs?.[slot];
  if (input?.link != null) return sourceOf(holder, slot, depth + 1);
  return input?.widget ? { node: holder, widget: input.widget.name } : null;
}

/** The nodes that the outputs of a node lead to, in and out of subgraphs. */
export function targetsOf(node) {
  return (node.outputs ?? []).flatMap((output) => ends(node.graph, output.links, 0));
}

function ends(graph, links, depth) {
  if (depth > DEEPEST) return [];
  return (links ?? []).flatMap((id) => {
    const link = graph?.getLink?.(id);
    const target = link && graph.getNodeById(link.target_id);
    if (target?.subgraph) return ends(target.subgraph, target.subgraph.inputs?.[link.target_slot]?.linkIds, depth + 1);
    if (target || !link) return target ? [target] : [];
    const holder = holderOf(graph);
    return holder ? ends(holder.graph, holder.outputs?.[link.target_slot]?.links, depth + 1) : [];
  });
}

/** The node that shows a subgraph in the graph around it. */
function holderOf(graph) {
  return everyNode(graph.rootGraph).find((each) => each.subgraph === graph);
}

/** All nodes of a graph and of the subgraphs in it. */
export function everyNode(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? everyNode(node.subgraph) : [])]);
}
