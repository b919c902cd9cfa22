// @ts-check
// How many steps the sampler after a node will do. Reads nodes of the graph.

import { flowsAround, sourceOf, valueOf } from "../live/graph.js";

const FARTHEST = 64;

/**
 * {steps_downstream} of the nearest active node after `node` that has a `steps` widget, null where
 * only a run can know its value; {} without one.
 */
export function stepsDownstream(node) {
  const flows = flowsAround(node);
  const seen = new Set([node]);
  let front = [node];
  while (front.length && seen.size < FARTHEST) {
    const fed = flows.filter(({ target, trail }) => !seen.has(target) && trail.some((each) => front.includes(each)));
    front = [...new Set(fed.map(({ target }) => target))];
    for (const each of front) {
      seen.add(each);
      const steps = stepsOf(each);
      if (steps !== undefined) return { steps_downstream: steps };
    }
  }
  return {};
}

function stepsOf(node) {
  if (node.mode || node.comfyClass?.startsWith("Braid")) return undefined;
  return [valueOf(node, "steps"), stepsOfSigmas(node)].find((steps) => steps === null || steps > 0);
}

/** Custom samplers take their steps from the scheduler node on their sigmas input. */
function stepsOfSigmas(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "sigmas") ?? -1;
  const source = slot < 0 ? null : sourceOf(node, slot);
  return source ? valueOf(source.node, "steps") : undefined;
}
