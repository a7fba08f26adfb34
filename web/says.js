import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { nodeOf } from './graph.js'
import { lastTexts, textOf } from './history.js'

/**
 * What nodes/host.py sends: a text for a node, which replaces the one before.
 * @typedef {{ node: string, text: string }} Said
 */

const HIGHEST = 240 // of a text, in pixels of the graph; the rest is scrolled to
const MARGIN = 10 // that the classic canvas leaves around a widget
const STYLE = `font: 12px/16px sans-serif; white-space: pre-wrap; overflow-wrap: anywhere; padding: 4px 8px;
  box-sizing: border-box; max-height: ${HIGHEST}px; overflow-x: hidden; overflow-y: auto; border-radius: 4px;
  background: var(--comfy-input-bg); user-select: text; -webkit-user-select: text; cursor: text; outline: none`

/** @type {WeakMap<GraphNode, Panel>} */
const panels = new WeakMap()

/** Shows on our nodes what they say, from now on. */
export function watchTexts() {
  api.addEventListener('wan_core.text', ({ detail }) => panelOf(detail.node)?.say(detail.text))
  api.addEventListener('executing', ({ detail }) => panelOf(detail)?.say('')) // of the run before
  api.addEventListener('executed', ({ detail }) => {
    const text = textOf(detail.output)
    if (text) panelOf(detail.display_node ?? detail.node)?.say(text)
  })
  api.addEventListener('execution_error', ({ detail }) => {
    panelOf(detail.node_id)?.say(String(detail.exception_message ?? '').trim(), true)
  })
  api.addEventListener('execution_cached', ({ detail }) => restoreTexts(detail.nodes))
}

/**
 * Gives a new node the place where it says something, of no height yet; see addPreview.
 * @param {GraphNode} node
 */
export function addText(node) {
  panels.set(node, new Panel(node))
}

/**
 * Shows a text on a node that no run has said.
 * @param {GraphNode} node
 * @param {string} text
 */
export function sayOn(node, text) {
  panels.get(node)?.say(text)
}

/**
 * Shows what nodes said in the last run that the server remembers, where they show nothing: after the page was loaded
 * again, or where a run had nothing to do for them.
 * @param {string[]} [ids] all nodes where left out
 */
export async function restoreTexts(ids) {
  if (ids && !ids.some((id) => panelOf(id)?.empty)) return
  for (const { id, text, error } of await lastTexts()) {
    if (ids && !ids.includes(id)) continue
    const panel = panelOf(id)
    if (panel?.empty) panel.say(text, error)
  }
}

/**
 * Shows what nodes said when the frontend puts the results of a workflow back, as it does when its tab is chosen.
 * @param {Record<string, { text?: unknown } | undefined>} outputs
 */
export function showOutputs(outputs) {
  for (const [id, output] of Object.entries(outputs ?? {})) {
    const text = textOf(output)
    const panel = text && panelOf(id)
    if (panel && panel.empty) panel.say(text)
  }
}

/** @param {unknown} id */
function panelOf(id) {
  const node = id === null || id === undefined ? undefined : nodeOf(String(id))
  return node ? panels.get(node) : undefined
}

class Panel {
  /** @param {GraphNode} node */
  constructor(node) {
    this.node = node
    /** @type {{ text: string, width: number, height: number } | undefined} */
    this.measured = undefined
    this.element = document.createElement('div')
    this.element.className = 'wan-core-text'
    this.element.style.cssText = STYLE
    this.element.style.display = 'none'
    this.element.tabIndex = -1
    this.element.dataset.captureWheel = 'true' // Nodes 2.0 then leaves the wheel to it
    this.letBeRead()
    const options = {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true,
      margin: 0,
      selectOn: [], // whoever marks a text does not mean the node, which the Delete key would remove
      getMinHeight: () => this.height(),
      getMaxHeight: () => this.height()
    }
    this.widget = node.addDOMWidget('wan_core_text', 'wan_core_text', this.element, options)
    this.widget.serialize = false
  }

  get empty() {
    return !this.element.textContent
  }

  /**
   * @param {string} text as plain text: whatever is in it is shown, never read as HTML
   * @param {boolean} [error]
   */
  say(text, error = false) {
    if (text === this.element.textContent) return
    this.element.textContent = text
    this.element.style.color = `var(${error ? '--error-text' : '--input-text'})`
    this.element.style.display = text ? 'block' : 'none'
    this.widget.options.margin = text ? MARGIN : 0 // of nothing it would be a negative height, which some ignore
    this.element.scrollTop = 0
    this.fit()
  }

  /** What the widget needs at the node's width. */
  height() {
    if (this.empty) return 0
    const width = Math.round(this.node.size[0]) - 2 * MARGIN
    const text = this.element.textContent ?? ''
    if (this.measured?.text !== text || this.measured.width !== width) {
      this.measured = { text, width, height: heightOf(text, width) }
    }
    return this.measured.height + 2 * MARGIN
  }

  /** Makes the node high enough, never smaller: a user may have made it larger. */
  fit() {
    const { size } = this.node
    const wanted = this.node.computeSize()[1]
    if (wanted > size[1]) this.node.setSize([size[0], wanted])
    this.node.setDirtyCanvas(true, true)
  }

  /** Marking, copying and scrolling are the text's; the canvas would move the node, copy it, and zoom. */
  letBeRead() {
    const own = (/** @type {Event} */ event) => event.stopPropagation()
    for (const kind of ['pointerdown', 'pointermove', 'pointerup', 'mousedown']) {
      this.element.addEventListener(kind, (event) => {
        if (!(/** @type {PointerEvent} */ (event).buttons & 4)) own(event)
      })
    }
    this.element.addEventListener('copy', own)
    this.element.addEventListener('wheel', (event) => {
      const { scrollHeight, clientHeight } = this.element
      if (!event.ctrlKey && scrollHeight > clientHeight) return own(event)
      event.preventDefault()
      own(event)
      app.canvas.processMouseWheel(event)
    })
  }
}

/**
 * The height of a text, measured where nobody sees it: the widget's own element may not be on the screen.
 * @param {string} text
 * @param {number} width
 */
function heightOf(text, width) {
  const ruler = document.createElement('div')
  ruler.style.cssText = `${STYLE}; position: fixed; visibility: hidden; left: 0; top: 0; width: ${width}px`
  ruler.textContent = text
  document.body.append(ruler)
  const height = ruler.offsetHeight
  ruler.remove()
  return height
}
