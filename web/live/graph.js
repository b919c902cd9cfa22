// @ts-check
// A node of the open graph as plain data for POST /braid/live/<noun>. Reads nodes, imports nothing.

const PREFIX = "Braid";
const DEEPEST = 16;

/**
 * A node's widgets and the Braid nodes linked to its inputs.
 * @returns {{node_id: string, values: Record<string, any>, inputs: Record<string, any>}}
 */
export function describeNode(node, depth = 0) {
  const values = {};
  for (const widget of node.widgets ?? []) {
    if (widget.serialize !== false && widget.type !== "button") values[widget.name] = widget.value;
  }
  const inputs = {};
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (input.link == null || depth > DEEPEST) continue;
    const source = sourceOf(node, slot);
    if (input.widget) values[input.widget.name] = constantOf(source);
    else if (source?.comfyClass?.startsWith(PREFIX)) inputs[input.name] = describeNode(source, depth + 1);
  }
  return { node_id: node.comfyClass, values, inputs };
}

/** The value of a primitive node, or null where only a run can know it. */
function constantOf(source) {
  const widget = source?.widgets?.find((each) => each.name === "value");
  return widget && !source.inputs?.some((input) => input.link != null) ? widget.value : null;
}

/** The node that feeds an input slot, through reroutes and in and out of subgraphs. */
export function sourceOf(node, slot, depth = 0) {
  const link = node.graph?.getLink?.(node.inputs?.[slot]?.link);
  if (!link || depth > DEEPEST) return null;
  const origin = node.graph.getNodeById(link.origin_id);
  if (!origin) return outsideOf(node.graph, link.origin_slot, depth);
  if (origin.subgraph) return insideOf(origin.subgraph, link.origin_slot, depth);
  const passesOn = origin.type === "Reroute" || origin.comfyClass === "Reroute";
  return passesOn ? sourceOf(origin, 0, depth + 1) : origin;
}

/** What feeds input `slot` of the subgraph node that holds `graph`. */
function outsideOf(graph, slot, depth) {
  const holder = everyNode(graph.rootGraph).find((each) => each.subgraph === graph);
  return holder ? sourceOf(holder, slot, depth + 1) : null;
}

/** The inner node behind output `slot` of a subgraph. */
function insideOf(subgraph, slot, depth) {
  const link = subgraph.getLink?.(subgraph.outputs?.[slot]?.linkIds?.[0]);
  const origin = link && subgraph.getNodeById(link.origin_id);
  if (!origin) return null;
  return origin.subgraph ? insideOf(origin.subgraph, link.origin_slot, depth + 1) : origin;
}

/** All nodes of a graph and of the subgraphs in it. */
function everyNode(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? everyNode(node.subgraph) : [])]);
}
