import { findWidget, greyUnread, onChange, setWidgets } from './widgets.js'

/** Which inputs of Wan Step Cache a policy reads. */
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
  onChange(policy, (value) => {
    const start = /** @type {Record<string, number>} */ (STARTS)[String(value)]
    if (start !== undefined) setWidgets(node, { threshold: start })
  })
  greyUnread(node, 'policy', READS)
}
