import { findWidget, onChange, onConfigured, setWidgets } from './widgets.js'

/** Which inputs of Wan Step Cache a policy reads; the others are greyed. */
const READS = {
  easy: ['threshold'],
  magnitude: ['threshold'],
  teacache: ['threshold', 'tea_model'],
  every: ['every']
}

/** A threshold to begin with when the user changes to a policy, because each adds up something else. */
const STARTS = { easy: 0.1, magnitude: 0.06, teacache: 0.1 }

/** @param {GraphNode} node */
export function watchStepCache(node) {
  const policy = findWidget(node, 'policy')
  if (!policy) return

  const show = () => {
    const read = /** @type {Record<string, string[]>} */ (READS)[String(policy.value)] ?? []
    for (const name of ['threshold', 'every', 'tea_model']) {
      const widget = findWidget(node, name)
      if (widget) widget.disabled = !read.includes(name)
    }
    node.setDirtyCanvas(true, true)
  }
  onChange(policy, (value) => {
    const start = /** @type {Record<string, number>} */ (STARTS)[String(value)]
    if (start !== undefined) setWidgets(node, { threshold: start })
    show()
  })
  onConfigured(node, show)
  show()
}
