/**
 * Widgets are always found by name, never by place: a later version may add some.
 * @param {GraphNode} node
 * @param {string} name
 * @returns {Widget | undefined}
 */
export function findWidget(node, name) {
  return node.widgets?.find((widget) => widget.name === name)
}

/**
 * Sets widgets as if the user had typed the values; names that the node lacks are passed over.
 * @param {GraphNode} node
 * @param {Record<string, unknown>} values
 */
export function setWidgets(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = findWidget(node, name)
    if (!widget) continue
    widget.value = value
    widget.callback?.(value)
  }
  node.setDirtyCanvas(true, true)
}

/**
 * Calls `listener` after the widget's own callback, whenever the user changes the widget.
 * @param {Widget} widget
 * @param {(value: unknown) => void} listener
 */
export function onChange(widget, listener) {
  const before = widget.callback
  widget.callback = function (...args) {
    const result = before?.apply(this, args)
    listener(widget.value)
    return result
  }
}

/**
 * Calls `listener` each time values are put into the node: when a workflow is opened, or the node pasted.
 * @param {GraphNode} node
 * @param {() => void} listener
 */
export function onConfigured(node, listener) {
  const before = node.onConfigure
  node.onConfigure = function (...args) {
    before?.apply(this, args)
    listener()
  }
}

/**
 * Greys the widgets that the chosen entry of a menu does not read; those that no entry names are left alone.
 * @param {GraphNode} node
 * @param {string} menu
 * @param {Record<string, string[]>} reads entry -> the widgets it reads
 */
export function greyUnread(node, menu, reads) {
  const chosen = findWidget(node, menu)
  if (!chosen) return
  const show = () => {
    const read = reads[String(chosen.value)] ?? []
    for (const name of new Set(Object.values(reads).flat())) {
      const widget = findWidget(node, name)
      if (widget) widget.disabled = !read.includes(name)
    }
    node.setDirtyCanvas(true, true)
  }
  onChange(chosen, show)
  onConfigured(node, show)
  show()
}
