// @ts-check
// How many steps the sampler after a node will do. Reads nodes of the graph, imports nothing.

const FARTHEST = 32;

/** {steps_downstream} of the nearest node after `node` that has a `steps` widget; {} without one. */
export function stepsDownstream(node) {
  const seen = new Set([node]);
  let front = [node];
  while (front.length && seen.size < FARTHEST) {
    front = front.flatMap(followers).filter((each) => !seen.has(each));
    for (const each of front) {
      seen.add(each);
      const steps = stepsOf(each);
      if (steps) return { steps_downstream: steps };
    }
  }
  return {};
}

function followers(node) {
  return (node.outputs ?? [])
    .flatMap((output) => output.links ?? [])
    .map((id) => node.graph?.getLink?.(id))
    .map((link) => link && node.graph.getNodeById(link.target_id))
    .filter(Boolean);
}

function stepsOf(node) {
  if (node.comfyClass?.startsWith("Braid")) return 0;
  return stepsWidget(node) || (node.inputs ?? []).map((input) => sigmasBefore(node, input)).find(Boolean) || 0;
}

/** Custom samplers take their steps from the scheduler node on their sigmas input. */
function sigmasBefore(node, input) {
  if (input.name !== "sigmas") return 0;
  const link = node.graph?.getLink?.(input.link);
  const source = link && node.graph.getNodeById(link.origin_id);
  return source ? stepsWidget(source) : 0;
}

function stepsWidget(node) {
  return Number(node.widgets?.find((widget) => widget.name === "steps")?.value) || 0;
}
