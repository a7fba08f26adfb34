import { SAMPLER } from './sampler_presets.js'
import { sayOn } from './says.js'
import { findWidget, onChange, setWidgets } from './widgets.js'

export const CUSTOM = 'custom' // no preset

/**
 * Choosing a preset of Wan Sampler fills in what it sets and says so; changing one of those makes it "custom" again.
 * @param {GraphNode} node
 */
export function watchPreset(node) {
  const preset = findWidget(node, 'preset')
  if (!preset) return
  let filling = false

  onChange(preset, (value) => {
    const chosen = SAMPLER[String(value)]
    if (!chosen) return
    filling = true
    setWidgets(node, chosen.values)
    filling = false
    sayOn(node, `${value}: ${chosen.says}`)
  })
  for (const name of Object.keys(SAMPLER['LightX2V-4step'].values)) {
    const widget = findWidget(node, name)
    if (!widget) continue
    onChange(widget, (value) => {
      const wanted = SAMPLER[String(preset.value)]?.values[name]
      if (filling || wanted === undefined || wanted === value) return
      setWidgets(node, { preset: CUSTOM })
      sayOn(node, '')
    })
  }
}
