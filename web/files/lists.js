// @ts-check
// Widgets that list files which a run writes. The front end reads such a list only when the page is
// loaded or R is pressed; after a run the new files belong in it.

/** node id -> its widget that lists files. */
export const LISTS = {
  BraidCheckpointing: "resume",
  BraidLoadCheckpoints: "folder",
  BraidLoadCalibration: "file",
};

/**
 * Bring the lists of these nodes up to date; their values stay.
 * @param {any[]} nodes
 * @param {(type: string) => Promise<any>} definitionOf what /object_info says of a node
 */
export async function renewLists(nodes, definitionOf) {
  for (const [type, name] of Object.entries(LISTS)) {
    const widgets = nodes
      .filter((node) => node.comfyClass === type)
      .flatMap((node) => node.widgets?.filter((widget) => widget.name === name) ?? []);
    if (!widgets.length) continue;
    const { required, optional } = (await definitionOf(type)).input;
    const [kind, options] = required?.[name] ?? optional[name];
    for (const widget of widgets) widget.options.values = Array.isArray(kind) ? kind : options.options;
  }
}
