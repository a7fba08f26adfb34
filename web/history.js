import { api } from '../../scripts/api.js'
import { nodeOf, openGraph } from './graph.js'
import { findWidget } from './widgets.js'

/**
 * An entry of ComfyUI's history: of `prompt`, place 2 is the graph that ran and place 3 what was sent along.
 * @typedef {{ class_type: string, inputs: Record<string, unknown> }} Ran
 * @typedef {{
 *   prompt: [number, string, Record<string, Ran>, { extra_pnginfo?: { workflow?: { id?: string } } }],
 *   outputs?: Record<string, { text?: unknown }>,
 *   meta?: Record<string, { display_node?: string }>,
 *   status?: { messages?: [string, { node_id?: string, exception_message?: string }][] }
 * }} Entry
 */

const LOOKED_AT = 16 // runs; each comes with its whole graph

/**
 * What the nodes of the open workflow said when each of them ran last with the values that it shows now.
 * @returns {Promise<{ id: string, text: string, error?: boolean }[]>}
 */
export async function lastTexts() {
  const answer = await api.fetchApi(`/history?max_items=${LOOKED_AT}`)
  if (!answer.ok) return []
  /** @type {Entry[]} */
  const entries = Object.values(await answer.json())
  /** @type {Map<string, { id: string, text: string, error?: boolean }>} */
  const found = new Map()
  for (const entry of entries.reverse()) {
    if (entry.prompt?.[3]?.extra_pnginfo?.workflow?.id !== openGraph()?.id) continue
    for (const said of textsIn(entry)) if (!found.has(said.id)) found.set(said.id, said)
  }
  return [...found.values()]
}

/**
 * What a node's output says.
 * @param {{ text?: unknown } | null | undefined} output
 */
export function textOf(output) {
  return [output?.text ?? []].flat().join('\n')
}

/** @param {Entry} entry */
function* textsIn({ prompt, outputs, meta, status }) {
  const graph = prompt[2]
  for (const [kind, detail] of status?.messages ?? []) {
    if (kind !== 'execution_error' || !asShown(String(detail.node_id), graph)) continue
    yield { id: String(detail.node_id), text: String(detail.exception_message ?? '').trim(), error: true }
  }
  for (const [ran, output] of Object.entries(outputs ?? {})) {
    const id = meta?.[ran]?.display_node ?? ran
    const text = textOf(output)
    if (text && asShown(id, graph)) yield { id, text }
  }
}

/**
 * Whether a node ran with the values that its widgets have now. The seed may have moved on since.
 * @param {string} id
 * @param {Record<string, Ran>} graph
 */
function asShown(id, graph) {
  const node = nodeOf(id)
  const ran = graph[id]
  if (!node || node.comfyClass !== ran?.class_type) return false
  return Object.entries(ran.inputs).every(([name, value]) => {
    const widget = findWidget(node, name)
    return !widget || name === 'seed' || Array.isArray(value) || widget.value === value
  })
}
