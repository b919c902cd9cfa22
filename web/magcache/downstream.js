// @ts-check
// How many steps the sampler after a node will do. Reads nodes of the graph.

import { sourceOf, targetsOf, valueOf } from "../live/graph.js";

const FARTHEST = 64;

/** {steps_downstream} of the nearest active node after `node` that has a `steps` widget; {} without one. */
export function stepsDownstream(node) {
  const seen = new Set([node]);
  let front = [node];
  while (front.length && seen.size < FARTHEST) {
    front = front.flatMap(targetsOf).filter((each) => !seen.has(each));
    for (const each of front) {
      seen.add(each);
      const steps = stepsOf(each);
      if (steps) return { steps_downstream: steps };
    }
  }
  return {};
}

function stepsOf(node) {
  if (node.mode || node.comfyClass?.startsWith("Braid")) return 0;
  return Number(valueOf(node, "steps")) || stepsOfSigmas(node);
}

/** Custom samplers take their steps from the scheduler node on their sigmas input. */
function stepsOfSigmas(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "sigmas") ?? -1;
  const source = slot < 0 ? null : sourceOf(node, slot);
  return source ? Number(valueOf(source.node, "steps")) || 0 : 0;
}
