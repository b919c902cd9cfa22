// @ts-check
// Tooltips of dynamic combos' fields in the user's language. Imports nothing.

/**
 * ComfyUI shows every tooltip from locales/ except those of a dynamic combo's fields, which keep the
 * text that the server sent. A field of `combo` is called `combo.field`, its text `combo_field`.
 *
 * @param {any} node a node whose fields come and go with the combo's choice
 * @param {{inputs?: Record<string, {tooltip?: string}>} | undefined} texts the node in nodeDefs.json
 */
export function translateFields(node, texts) {
  const inputs = texts?.inputs;
  if (!inputs) return;
  const translate = (widget) => {
    const translated = inputs[widget.name.replaceAll(".", "_")]?.tooltip;
    if (widget.tooltip && translated) widget.tooltip = translated;
  };
  node.widgets?.forEach(translate);
  const { onInputAdded } = node;
  node.onInputAdded = function (slot, ...args) {
    onInputAdded?.call(this, slot, ...args);
    this.widgets?.filter((widget) => widget.name === slot.widget?.name).forEach(translate);
  };
}
