import { app } from '../../scripts/app.js'
import { LENGTH, SIZE } from './presets.js'
import { SAMPLER } from './sampler_presets.js'
import { texts } from './texts.js'
import { setWidgets } from './widgets.js'

/**
 * The presets of a node: entries for its menu, none for nodes that have no presets.
 * @param {GraphNode} node
 * @returns {MenuItem[]}
 */
export function presetsOf(node) {
  switch (node.comfyClass) {
    case 'WanCoreSampler':
      return [submenu(node, texts().settings, presetsByName())]
    case 'WanCoreEmptyLatent':
    case 'WanCoreImageToVideo':
      return [submenu(node, texts().size, SIZE), submenu(node, texts().length, LENGTH)]
    default:
      return []
  }
}

/** Wan Sampler's own widget fills in the rest: see watchPreset. */
function presetsByName() {
  return Object.fromEntries(Object.keys(SAMPLER).map((preset) => [preset, { preset }]))
}

/**
 * @param {GraphNode} node
 * @param {string} content
 * @param {Record<string, Record<string, unknown>>} presets
 * @returns {MenuItem}
 */
function submenu(node, content, presets) {
  const options = Object.entries(presets).map(([name, values]) => ({
    content: name,
    callback: () => setWidgets(node, values)
  }))
  return { content, has_submenu: true, submenu: { options } }
}

/** Opens the presets of the selected node beside it: for menus that do not show what extensions add. */
export function openPresets() {
  const node = Object.values(app.canvas.selected_nodes).find((node) => presetsOf(node).length)
  if (!node) return
  const { scale, offset } = app.canvas.ds
  const { left, top } = app.canvas.canvas.getBoundingClientRect()
  const clientX = left + (node.pos[0] + offset[0]) * scale
  const clientY = top + (node.pos[1] + offset[1]) * scale
  new LiteGraph.ContextMenu(presetsOf(node), { event: new MouseEvent('click', { clientX, clientY }) })
}
