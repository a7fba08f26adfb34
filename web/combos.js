/**
 * Lists names of files as text in the menus of a node's widgets: the classic canvas of ComfyUI 0.3.75 reads them as
 * HTML, and whoever made a file chose its name.
 * @param {GraphNode} node
 */
export function listAsText(node) {
  for (const widget of node.widgets ?? []) {
    const open = widget.type === 'combo' && widget.onClick
    if (open) widget.onClick = (...args) => withPlainItems(() => open.apply(widget, args))
  }
}

/**
 * @param {() => unknown} open a menu, at once
 */
function withPlainItems(open) {
  const menu = LiteGraph.ContextMenu.prototype
  const { addItem } = menu
  menu.addItem = function (name, value, options) {
    if (typeof value !== 'string') return addItem.call(this, name, value, options)
    const element = addItem.call(this, '', value, options)
    element.textContent = name
    return element
  }
  try {
    return open()
  } finally {
    menu.addItem = addItem
  }
}
