// @ts-check
/// <reference path="./types.d.ts" />
import { findWidget, onChange, onConfigured } from './widgets.js'

/** What `boundary` means in each mode, and a value to begin with when the user changes to that mode. */
const MODES = {
  auto: { label: 'boundary' },
  timestep: { label: 'low below timestep', start: 0.875 },
  step: { label: 'low from step', start: 20 },
  snr: { label: 'low from SNR', start: 0.02 }
}

/**
 * Says what the boundary of Wan Expert Switch means, and greys it where it is ignored.
 * @param {Node} node
 */
export function watchExpertSwitch(node) {
  const mode = findWidget(node, 'mode')
  const boundary = findWidget(node, 'boundary')
  if (!mode || !boundary) return

  const show = () => {
    const about = MODES[/** @type {keyof typeof MODES} */ (mode.value)]
    if (!about) return
    boundary.label = about.label
    boundary.disabled = mode.value === 'auto'
    node.setDirtyCanvas(true, true)
  }
  onChange(mode, (value) => {
    const start = MODES[/** @type {keyof typeof MODES} */ (value)]?.start
    if (start !== undefined) boundary.value = start
    show()
  })
  onConfigured(node, show)
  show()
}
