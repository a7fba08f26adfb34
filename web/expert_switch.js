import { texts } from './texts.js'
import { findWidget, onChange, onConfigured, setWidgets } from './widgets.js'

/** A boundary to begin with when the user changes to a mode, because each measures in units of its own. */
const STARTS = { timestep: 0.875, step: 20, snr: 0.02 }

/**
 * Says what the boundary of Wan Expert Switch means, and greys it where it is ignored.
 * @param {GraphNode} node
 */
export function watchExpertSwitch(node) {
  const mode = findWidget(node, 'mode')
  const boundary = findWidget(node, 'boundary')
  if (!mode || !boundary) return

  const show = () => {
    const labels = /** @type {Record<string, string>} */ (texts().boundary)
    boundary.label = labels[String(mode.value)] ?? boundary.label
    boundary.disabled = mode.value === 'auto'
    node.setDirtyCanvas(true, true)
  }
  onChange(mode, (value) => {
    const start = /** @type {Record<string, number>} */ (STARTS)[String(value)]
    if (start !== undefined) setWidgets(node, { boundary: start })
    show()
  })
  onConfigured(node, show)
  show()
}
