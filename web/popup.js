/**
 * A list below an element of a node, on top of everything and in the size of the interface: readable at any zoom.
 * One is open at most. All texts are put in as text.
 */

/** @typedef {import('./palette.js').Entry} Entry */
/** @typedef {{ label: string, done: string, value?: string, stay?: boolean, take: (value: string) => void }} Ask */

const STYLE = `position: fixed; z-index: 10000; box-sizing: border-box; max-height: 320px; overflow-y: auto; padding: 4px;
  border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-menu-bg); color: var(--input-text);
  font: 13px/18px sans-serif; box-shadow: 0 4px 16px rgb(0 0 0 / 40%)`
const WIDTH = 340
const MOST = 320 // pixels high

/** @type {{ element: HTMLElement, anchor: HTMLElement, rows: HTMLElement[], active: number, close: () => void } | undefined} */
let open

/**
 * @param {HTMLElement} anchor which keeps the focus, unless there is something to ask
 * @param {Entry[]} entries
 * @param {{ active?: number, note?: string, ask?: Ask }} options
 */
export function openPopup(anchor, entries, { active = -1, note = '', ask }) {
  closePopup()
  const element = make('div', STYLE)
  element.className = 'wan-core-popup'
  element.setAttribute('role', 'listbox')
  const rows = entries.map((entry) => rowOf(entry))
  const field = ask && askFor(ask)
  element.append(...(field ? [field.form] : []), ...rows)
  if (note) element.append(Object.assign(make('div', 'padding: 2px 8px'), { textContent: note }))
  const { left, top, bottom } = anchor.getBoundingClientRect()
  element.style.width = `${WIDTH}px`
  element.style.left = `${Math.max(Math.min(left, innerWidth - WIDTH - 8), 8)}px`
  if (innerHeight - bottom < MOST && top > innerHeight - bottom) element.style.bottom = `${innerHeight - top + 2}px`
  else element.style.top = `${bottom + 2}px`
  element.style.maxHeight = `${Math.min(MOST, Math.max(top, innerHeight - bottom) - 10)}px`
  keepEvents(element)
  element.addEventListener('pointerdown', (event) => {
    if (!(event.target instanceof HTMLInputElement)) event.preventDefault() // the field keeps the focus
  })
  document.body.append(element)
  const outside = (/** @type {Event} */ event) => {
    const target = /** @type {Node} */ (event.target)
    if (!element.contains(target) && !anchor.contains(target)) closePopup()
  }
  const away = () => closePopup()
  addEventListener('pointerdown', outside, true)
  addEventListener('wheel', outside, true)
  addEventListener('resize', away)
  anchor.addEventListener('keydown', keys, true)
  element.addEventListener('keydown', keys)
  anchor.ariaExpanded = 'true'
  open = {
    element,
    anchor,
    rows,
    active: -1,
    close: () => {
      removeEventListener('pointerdown', outside, true)
      removeEventListener('wheel', outside, true)
      removeEventListener('resize', away)
      anchor.removeEventListener('keydown', keys, true)
      anchor.ariaExpanded = 'false'
      element.remove()
    }
  }
  activate(active)
  if (field) field.input.select()
}

/** @param {HTMLElement} [anchor] only if it is open there */
export function closePopup(anchor) {
  if (!open || (anchor && open.anchor !== anchor)) return
  const { close } = open
  open = undefined
  close()
}

/** @param {KeyboardEvent} event */
function keys(event) {
  if (!open || event.isComposing) return
  const { rows, active } = open
  if (event.key === 'ArrowDown') activate(Math.min(active + 1, rows.length - 1))
  else if (event.key === 'ArrowUp') activate(Math.max(active - 1, -1))
  else if (event.key === 'Enter' && active >= 0) rows[active].click()
  else if (event.key === 'Escape') {
    const { anchor } = open
    closePopup()
    anchor.focus()
  } else return
  event.preventDefault()
  event.stopPropagation()
}

/** @param {number} place */
function activate(place) {
  if (!open) return
  open.active = place
  open.rows.forEach((row, index) => {
    row.ariaSelected = String(index === place)
    row.style.background = index === place ? 'var(--border-color)' : 'transparent'
  })
  open.rows[place]?.scrollIntoView({ block: 'nearest' })
}

/** @param {Entry} entry */
function rowOf({ text, about, pick, remove }) {
  const row = make('div', 'display: flex; gap: 8px; align-items: baseline; padding: 2px 8px; border-radius: 4px; cursor: pointer')
  row.setAttribute('role', 'option')
  const name = Object.assign(make('span', 'flex: none'), { textContent: text })
  const more = Object.assign(make('span', `flex: 1 1 auto; min-width: 0; opacity: 0.65; font-size: 11px; overflow: hidden;
    white-space: nowrap; text-overflow: ellipsis; text-align: right`), { textContent: about ?? '', title: about ?? '' })
  row.append(name, more)
  row.addEventListener('click', () => {
    closePopup()
    pick()
  })
  row.addEventListener('pointermove', () => activate(open?.rows.indexOf(row) ?? -1))
  if (remove) {
    const cross = Object.assign(make('button', 'all: unset; cursor: pointer; padding: 0 4px'), { textContent: '×', ariaLabel: `× ${text}` })
    cross.addEventListener('click', (event) => {
      event.stopPropagation()
      closePopup()
      remove()
    })
    row.append(cross)
  }
  return row
}

/** @param {Ask} ask */
function askFor({ label, done, value = '', stay, take }) {
  const form = make('form', 'display: flex; gap: 4px; padding: 2px 4px 6px')
  const input = make('input', `flex: 1 1 auto; min-width: 0; padding: 3px 8px; border: 1px solid var(--border-color);
    border-radius: 6px; background: var(--comfy-input-bg); color: inherit; font: inherit`)
  input.type = 'text'
  input.maxLength = 80
  input.value = value
  input.placeholder = input.ariaLabel = label
  input.autocomplete = 'off'
  const button = make('button', 'padding: 2px 10px; border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-input-bg); color: inherit; font: inherit; cursor: pointer')
  button.textContent = done
  form.append(input, button)
  form.addEventListener('submit', (event) => {
    event.preventDefault()
    if (!input.value.trim()) return
    take(input.value.trim())
    if (!stay) closePopup()
  })
  return { form, input }
}

/**
 * Keys, clicks and the wheel are the element's; the canvas would move the node, delete it, and zoom. The middle button
 * still moves the view, and Ctrl with the wheel zooms.
 * @param {HTMLElement} element
 */
export function keepEvents(element) {
  for (const kind of ['pointerdown', 'pointermove', 'pointerup', 'mousedown']) {
    element.addEventListener(kind, (event) => {
      if (!(/** @type {PointerEvent} */ (event).buttons & 4)) event.stopPropagation()
    })
  }
  for (const kind of ['copy', 'cut', 'paste']) element.addEventListener(kind, (event) => event.stopPropagation())
  element.addEventListener('keydown', (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation()
  })
  element.addEventListener('wheel', (event) => {
    if (!event.ctrlKey) event.stopPropagation()
  })
}

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} style
 */
export function make(tag, style) {
  const element = document.createElement(tag)
  element.style.cssText = style
  return element
}

/** @param {'dice' | 'menus'} kind */
export function icon(kind) {
  const draw = (/** @type {string} */ tag, /** @type {Record<string, string>} */ attributes) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', tag)
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
    return element
  }
  const svg = draw('svg', { width: '14', height: '14', viewBox: '0 0 14 14', fill: 'none', stroke: 'currentColor' })
  svg.setAttribute('style', 'display: block; margin: 1px 0; pointer-events: none')
  if (kind === 'menus') svg.append(...['3', '7', '11'].map((y) => draw('path', { d: `M2 ${y}h10` })))
  else {
    svg.append(draw('rect', { x: '1', y: '1', width: '12', height: '12', rx: '2.5' }))
    for (const [cx, cy] of [['4.5', '4.5'], ['7', '7'], ['9.5', '9.5'], ['9.5', '4.5'], ['4.5', '9.5']]) {
      svg.append(draw('circle', { cx, cy, r: '0.7', fill: 'currentColor' }))
    }
  }
  return svg
}
