import { api } from '../../scripts/api.js'
import { nodeOf } from './graph.js'
import { texts } from './texts.js'

/**
 * What nodes/preview.py sends of a run: a line of text, or a picture as a data URL.
 * @typedef {{ step: number, steps: number, expert: string, sigma: number, left: number | null, skipped?: number,
 *   computed?: boolean }} Line
 * @typedef {{ node: string, run: number, line?: Line, picture?: string }} News
 */

const LINE_HEIGHT = 18
const TEXT_HEIGHT = 2 * LINE_HEIGHT
const MARGIN = 10 // that the classic canvas leaves around a widget
const HIGHEST = 400 // of a picture, in pixels of the graph
const NOWHERE = '-1' // a place where no node is

/** @type {WeakMap<GraphNode, Panel>} */
const panels = new WeakMap()
/** @type {Set<Panel>} */
const counting = new Set()

/**
 * Shows runs of Wan Sampler on their nodes, from now on. To be called while extensions load: listeners are called in
 * the order in which they came, and the frontend's own come later.
 */
export function watchPreviews() {
  api.addEventListener('wan_core.preview', ({ detail }) => panelOf(detail.node)?.show(detail))
  api.addEventListener('b_preview_with_metadata', withoutTheStill)
  for (const end of ['execution_success', 'execution_error', 'execution_interrupted']) {
    api.addEventListener(end, () => counting.forEach((panel) => panel.stop()))
  }
}

/**
 * Gives a new node the place where its runs are shown, of no height yet. Not made when a run begins: Nodes 2.0 of
 * ComfyUI 0.3.75 shows no widget that comes after the node's links.
 * @param {GraphNode} node
 */
export function addPreview(node) {
  panels.set(node, new Panel(node))
}

/** @param {string} id */
function panelOf(id) {
  const node = nodeOf(id)
  return node ? panels.get(node) : undefined
}

/**
 * The still preview that every sampler sends would be a second picture on the node. It goes on to whoever else shows
 * it, the node of a subgraph around ours above all, and moves there too where an image can.
 * @param {CustomEvent} event
 */
function withoutTheStill({ detail }) {
  const id = String(detail.displayNodeId)
  const panel = panelOf(id)
  if (!panel?.line) return
  detail.displayNodeId = id.includes(':') ? id.slice(0, id.lastIndexOf(':')) : NOWHERE
  detail.blob = panel.blob ?? detail.blob
}

class Panel {
  /** @param {GraphNode} node */
  constructor(node) {
    this.node = node
    this.run = 0
    /** @type {Line | undefined} */
    this.line = undefined
    /** @type {Blob | undefined} */
    this.blob = undefined
    this.image = Object.assign(document.createElement('img'), { hidden: true, draggable: false })
    this.image.style.cssText = `flex: 1 1 auto; min-height: 0; max-height: ${HIGHEST}px; object-fit: contain`
    this.image.onload = () => this.fit()
    this.text = document.createElement('div')
    this.text.style.cssText = `flex: none; font-size: 12px; line-height: ${LINE_HEIGHT}px; height: ${TEXT_HEIGHT}px;
      text-align: center; color: var(--input-text); white-space: pre; overflow: hidden; text-overflow: ellipsis`
    this.element = document.createElement('div')
    this.element.className = 'wan-core-preview'
    this.element.style.cssText = 'display: none; flex-direction: column; width: 100%; height: 100%; overflow: hidden'
    this.element.append(this.image, this.text)
    const options = {
      serialize: false,
      hideOnZoom: false,
      margin: 0,
      getMinHeight: () => this.height(),
      getMaxHeight: () => (this.line ? undefined : 0)
    }
    this.widget = node.addDOMWidget('wan_core_preview', 'wan_core_preview', this.element, options)
    this.widget.serialize = false
  }

  /** @param {News} news */
  show({ run, line, picture }) {
    if (run < this.run) return // a picture that was still being made when the next run began
    if (run > this.run) this.clear()
    this.run = run
    if (line) this.say(line)
    if (picture) this.paint(picture)
  }

  clear() {
    this.blob = undefined
    this.image.hidden = true
  }

  /** @param {string} picture */
  paint(picture) {
    const bytes = Uint8Array.from(atob(picture.slice(picture.indexOf(',') + 1)), (char) => char.charCodeAt(0))
    this.blob = new Blob([bytes], { type: 'image/webp' })
    const before = this.image.src
    this.image.src = URL.createObjectURL(this.blob)
    this.image.hidden = false
    if (before) URL.revokeObjectURL(before)
  }

  /** @param {Line} line */
  say(line) {
    this.stop()
    const first = !this.line
    this.line = line
    this.ends = line.left === null || line.step === line.steps ? undefined : Date.now() + 1000 * line.left
    this.write()
    if (this.ends) this.clock = setInterval(() => this.write(), 1000)
    counting.add(this)
    if (!first) return
    this.element.style.display = 'flex'
    this.widget.options.margin = MARGIN // of nothing it would be a negative height, which some frontends ignore
    this.fit()
  }

  /** Counts down no longer: the run has ended, well or not. */
  stop() {
    clearInterval(this.clock)
    counting.delete(this)
    if (this.ends && this.line) {
      this.ends = undefined
      this.write()
    }
  }

  write() {
    const { step, steps, expert, sigma, skipped, computed } = /** @type {Line} */ (this.line)
    const words = texts()
    const experts = /** @type {Record<string, string>} */ (words.expert)
    const left = this.ends && fill(words.left, clock(Math.max(this.ends - Date.now(), 0) / 1000))
    const lines = [
      [experts[expert], step ? fill(words.step, step, steps) : words.starting, computed === false && words.extrapolated],
      [`sigma ${sigma.toFixed(2)}`, skipped ? fill(words.skipped, skipped) : undefined, left]
    ]
    this.text.textContent = lines.map((parts) => parts.filter(Boolean).join(' · ')).join('\n')
  }

  /** What the widget needs at the node's width. */
  height() {
    const { naturalWidth, naturalHeight, hidden } = this.image
    if (!this.line) return 0
    if (hidden || !naturalWidth) return TEXT_HEIGHT + 2 * MARGIN
    return TEXT_HEIGHT + 2 * MARGIN + Math.min((this.node.size[0] * naturalHeight) / naturalWidth, HIGHEST)
  }

  /** Makes the node high enough, never smaller: a user may have made it larger. */
  fit() {
    const { size } = this.node
    const wanted = this.node.computeSize()[1]
    if (wanted > size[1]) this.node.setSize([size[0], wanted])
    this.node.setDirtyCanvas(true, true)
  }
}

/**
 * @param {string} text
 * @param {...unknown} values
 */
function fill(text, ...values) {
  return text.replace(/\{(\d)\}/g, (_, place) => String(values[Number(place)]))
}

/**
 * 250 -> "4:10", 7200 -> "2:00:00"
 * @param {number} seconds
 */
function clock(seconds) {
  const whole = Math.round(seconds)
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60]
  const pad = (/** @type {number} */ number) => String(number).padStart(2, '0')
  return `${hours ? `${hours}:${pad(minutes)}` : minutes}:${pad(whole % 60)}`
}
