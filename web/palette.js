import { app } from '../../scripts/app.js'
import { GROUPS, LOOKS, TERMS } from './palette_terms.js'
import { capitalised, compose, conflicts, findTerms, inOrder, parsePalette, readLine, roll, term } from './palette_words.js'
import { closePopup, icon, keepEvents, make, openPopup } from './popup.js'
import { inChinese, texts } from './texts.js'
import { findWidget, onChange, onConfigured, setWidgets } from './widgets.js'

const NONE = 'none' // the first entry of every menu
const HEIGHT = 168 // that the palette has at least: the field, two rows of chips, four lines of the prompt
const MARGIN = 10 // that the classic canvas leaves around a widget
const GAP = 4 // that it leaves between two of them
const LOOKS_SETTING = 'wan_core.Palette.Looks'
const MENUS_SHOWN = 'wan_core_menus' // a node's property: whether its menus are shown beside the palette

const BOX = 'border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-input-bg); color: var(--input-text)'
const BUTTON = `${BOX}; padding: 2px 8px; font: inherit; line-height: 16px; cursor: pointer; flex: none`

/** A user's own looks, kept in ComfyUI's settings: they belong to the user, not to a workflow. @type {Setting[]} */
export const paletteSettings = [
  { id: LOOKS_SETTING, name: 'Own looks of Wan Aesthetic Prompt', type: 'hidden', defaultValue: {} }
]

/** @typedef {{ text: string, about?: string, pick: () => void, remove?: () => void }} Entry */

/** @param {GraphNode} node */
export function addPalette(node) {
  if (findWidget(node, 'palette')) new Palette(node)
}

class Palette {
  /** @param {GraphNode} node */
  constructor(node) {
    this.node = node
    const words = texts().palette
    this.field = make('input', `${BOX}; flex: 1 1 0; min-width: 0; padding: 3px 8px; font: inherit`)
    this.field.type = 'text'
    this.field.placeholder = words.find
    this.field.ariaLabel = words.find
    this.field.autocomplete = 'off'
    this.field.spellcheck = false
    this.field.setAttribute('role', 'combobox')
    this.field.addEventListener('input', () => this.suggest())
    this.field.addEventListener('click', () => this.suggest())
    this.field.addEventListener('blur', () => closePopup(this.field))
    this.field.addEventListener('keydown', (event) => this.typed(event))
    const row = make('div', 'display: flex; gap: 4px; flex: none')
    this.looks = this.button(words.looks, words.looks, () => this.showLooks())
    this.dice = this.button('', words.dice, () => this.showDice(Math.floor(Math.random() * 1e6)))
    this.dice.append(icon('dice'))
    this.menus = this.button('', words.menus, () => this.toggleMenus())
    this.menus.append(icon('menus'))
    row.append(this.field, this.looks, this.dice, this.menus)
    this.chips = make('div', 'display: flex; flex-wrap: wrap; gap: 4px; flex: 0 1 auto; min-height: 0; overflow-y: auto')
    this.chips.setAttribute('role', 'group')
    this.chips.ariaLabel = words.chosen
    this.chips.addEventListener('keydown', (event) => this.alongChips(event))
    this.warning = make('div', `flex: none; color: var(--error-text); max-height: 32px; overflow-y: auto;
      padding: 0 8px; border-radius: 6px; background: var(--comfy-input-bg)`)
    this.warning.setAttribute('role', 'status')
    this.prompt = make('div', `${BOX}; flex: 1 1 48px; min-height: 34px; overflow-y: auto; padding: 2px 8px; opacity: 0.85;
      white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; -webkit-user-select: text; cursor: text`)
    this.prompt.className = 'wan-core-prompt'
    this.prompt.ariaLabel = this.prompt.title = words.prompt
    this.element = make('div', `display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; width: 100%;
      height: 100%; min-height: ${HEIGHT}px; font: 12px/16px sans-serif; color: var(--input-text)`)
    this.element.className = 'wan-core-palette'
    this.element.dataset.captureWheel = 'true' // Nodes 2.0 then leaves the wheel to it
    this.element.append(row, this.chips, this.warning, this.prompt)
    keepEvents(this.element)
    this.widget = node.addDOMWidget('wan_core_palette', 'wan_core_palette', this.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      selectOn: [],
      getMinHeight: () => HEIGHT + 2 * MARGIN,
      getMaxHeight: () => undefined
    })
    this.widget.serialize = false
    this.watch()
  }

  watch() {
    const { node } = this
    for (const name of ['text', 'language', 'placement', 'palette', ...GROUPS.map(({ id }) => id)]) {
      const widget = findWidget(node, name)
      if (widget) onChange(widget, () => this.show())
    }
    onConfigured(node, () => {
      this.hideMenus()
      this.show()
    })
    const { onConnectionsChange, onRemoved } = node
    node.onConnectionsChange = (...args) => {
      onConnectionsChange?.apply(node, args)
      this.hideMenus()
      this.show()
    }
    node.onRemoved = (...args) => {
      onRemoved?.apply(node, args)
      closePopup()
    }
    this.hideMenus()
    this.show()
  }

  /** Ids of all chosen terms: those of the menus, and those of the palette's own widget. */
  chosen() {
    return inOrder([...this.inMenus().map(({ id }) => id), ...parsePalette(this.value('palette')).ids])
  }

  inMenus() {
    return GROUPS.flatMap(({ id: group }) => {
      const entry = this.value(group).toLowerCase()
      const found = entry && entry !== NONE && TERMS.find(
        (row) => row.group === group && (row.id === entry || `${row.en} / ${row.zh}`.toLowerCase() === entry))
      return found ? [found] : []
    })
  }

  /** @param {string} name of a widget */
  value(name) {
    return String(findWidget(this.node, name)?.value ?? '')
  }

  /**
   * Writes the terms into the node's plain widgets: what a menu says stays there, all else goes into the palette's.
   * @param {string[]} ids
   */
  choose(ids) {
    const menus = this.inMenus()
    const gone = menus.filter(({ id }) => !ids.includes(id))
    const rest = inOrder(ids).filter((id) => !menus.some((row) => row.id === id))
    setWidgets(this.node, {
      ...Object.fromEntries(gone.map(({ group }) => [group, NONE])),
      palette: rest.join(', ')
    })
    this.show()
  }

  show() {
    const ids = this.chosen()
    const pairs = conflicts(ids)
    const against = (/** @type {string} */ id) => pairs.flatMap((pair) => (pair.includes(id) ? pair : [])).filter(
      (other) => other !== id)
    const words = texts().palette
    this.chips.replaceChildren(...ids.map((id) => this.chip(id, against(id).map(named))))
    const { unknown } = parsePalette(this.value('palette'))
    const said = pairs.map((pair) => pair.map(named).join(' ↔ '))
    if (unknown.length) said.push(`${words.unknown} ${unknown.join(', ')}`)
    this.warning.textContent = said.join(' · ')
    this.warning.style.display = said.length ? 'block' : 'none'
    this.warning.title = pairs.length ? words.conflict : ''
    const linked = this.node.inputs?.some(({ name, link }) => name === 'text' && link !== null && link !== undefined)
    const text = linked ? '…' : this.value('text')
    this.prompt.textContent = compose(text, ids, this.value('language'), this.value('placement'))
    this.node.setDirtyCanvas(true, true)
  }

  /**
   * @param {string} id
   * @param {string[]} against names of terms that it contradicts
   */
  chip(id, against) {
    const words = texts().palette
    const chip = this.button(`${against.length ? '⚠ ' : ''}${named(id)} ×`, `${words.remove}: ${named(id)}`, () => this.drop(id))
    chip.className = against.length ? 'wan-core-chip wan-core-conflict' : 'wan-core-chip'
    chip.dataset.term = id
    chip.title = against.length ? `${words.conflict}: ${against.join(', ')}` : other(id)
    chip.style.borderRadius = '12px'
    if (against.length) chip.style.borderColor = chip.style.color = 'var(--error-text)'
    return chip
  }

  /** @param {string} id */
  drop(id) {
    const place = this.chosen().indexOf(id)
    this.choose(this.chosen().filter((other) => other !== id))
    const chips = /** @type {HTMLElement[]} */ ([...this.chips.children])
    ;(chips[place] ?? chips[place - 1] ?? this.field).focus()
  }

  /** @param {KeyboardEvent} event on a chip */
  alongChips(event) {
    const chips = /** @type {HTMLElement[]} */ ([...this.chips.children])
    const place = chips.indexOf(/** @type {HTMLElement} */ (event.target))
    if (place < 0) return
    if (event.key === 'ArrowLeft') chips[Math.max(place - 1, 0)].focus()
    else if (event.key === 'ArrowRight') (chips[place + 1] ?? this.field).focus()
    else if (event.key === 'Backspace' || event.key === 'Delete') this.drop(chips[place].dataset.term ?? '')
    else if (event.key === 'Escape') this.field.focus()
    else return
    event.preventDefault()
  }

  /** @param {KeyboardEvent} event in the field, that no popup took */
  typed(event) {
    if (event.isComposing) return
    if (event.key === 'Enter' && !event.ctrlKey && !event.metaKey) this.addLine()
    else if (event.key === 'Backspace' && !this.field.value && this.chips.lastElementChild) {
      this.choose(this.chosen().slice(0, -1))
      this.suggest()
    } else if (event.key === 'ArrowDown') this.suggest()
    else if (event.key === 'ArrowLeft' && !this.field.value) {
      /** @type {HTMLElement | null} */ (this.chips.lastElementChild)?.focus()
    } else return
    event.preventDefault()
  }

  /** What the field names becomes chips; what it names nothing by stays in it. */
  addLine() {
    const { ids, unknown } = readLine(this.field.value)
    this.field.value = unknown.join(', ')
    if (ids.length) this.choose([...this.chosen(), ...ids])
    closePopup()
    if (unknown.length) openPopup(this.field, [], { note: `${texts().palette.unknown} ${unknown.join(', ')}` })
  }

  /** Lists what the last part of the field's line may mean; all terms, by groups, where it is empty. */
  suggest() {
    const start = Math.max(...[',', ';', '，', '；', '、'].map((mark) => this.field.value.lastIndexOf(mark))) + 1
    const last = this.field.value.slice(start)
    const have = this.chosen()
    const ids = (last.trim() ? findTerms(last) : TERMS.map(({ id }) => id)).filter((id) => !have.includes(id))
    const entries = ids.map((id) => ({
      text: named(id),
      about: `${other(id)} · ${groupOf(id)}`,
      pick: () => {
        const { ids, unknown } = readLine(this.field.value.slice(0, start))
        this.field.value = unknown.join(', ')
        this.choose([...this.chosen(), ...ids, id])
        this.field.focus()
      }
    }))
    openPopup(this.field, entries, {
      active: last.trim() && !start ? 0 : -1, // Enter takes a whole line where there is one
      note: entries.length ? '' : `${texts().palette.unknown} ${last.trim()}`
    })
  }

  showLooks() {
    const words = texts().palette
    const own = ownLooks()
    /** @type {Entry[]} */
    const entries = Object.entries(own).map(([name, ids]) => ({
      text: name,
      about: ids.map(named).join(', '),
      pick: () => this.choose(ids),
      remove: () => {
        void keepLooks(Object.fromEntries(Object.entries(own).filter(([other]) => other !== name)))
        this.looks.focus()
      }
    }))
    for (const look of LOOKS) {
      const name = inChinese() ? look.zh : look.en
      entries.push({ text: name, about: look.terms.map(named).join(', '), pick: () => this.choose(look.terms) })
    }
    const ids = this.chosen()
    openPopup(this.looks, entries, {
      ask: ids.length
        ? { label: words.save, done: words.keep, take: (name) => void keepLooks({ ...ownLooks(), [name]: ids }) }
        : undefined
    })
  }

  /** @param {number} seed */
  showDice(seed) {
    const words = texts().palette
    this.choose(roll(seed))
    openPopup(this.dice, [], {
      ask: {
        label: words.seed,
        done: words.roll,
        value: String(seed),
        stay: true,
        take: (typed) => this.choose(roll(Math.abs(Math.trunc(Number(typed))) % 2 ** 32 || 0))
      }
    })
  }

  /** Nodes 2.0 of ComfyUI 0.3.75 reads what is hidden once: there it shows when the workflow is opened next. */
  toggleMenus() {
    const { node } = this
    node.properties[MENUS_SHOWN] = !node.properties[MENUS_SHOWN]
    this.hideMenus()
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
  }

  /** The menus are hidden, but for those that a link feeds; their values are the palette's as before. */
  hideMenus() {
    const { node } = this
    const linked = new Set(node.inputs?.filter(({ link }) => link !== null && link !== undefined).map(({ name }) => name))
    const shown = Boolean(node.properties[MENUS_SHOWN])
    for (const name of [...GROUPS.map(({ id }) => id), 'palette']) {
      const widget = findWidget(node, name)
      if (!widget) continue
      const hidden = !linked.has(name) && (!shown || name === 'palette')
      widget.options.hidden = hidden // for Nodes 2.0 of older frontends
      widget.hidden = hidden
      if (hidden) widget.computeSize = () => [0, -GAP] // classic canvas of older frontends: else it keeps its place
      else delete widget.computeSize
    }
    this.menus.ariaPressed = String(shown)
    node.setDirtyCanvas(true, true)
  }

  /**
   * @param {string} text
   * @param {string} label
   * @param {() => void} press
   */
  button(text, label, press) {
    const button = make('button', BUTTON)
    button.type = 'button'
    button.textContent = text
    button.ariaLabel = button.title = label
    button.addEventListener('click', press)
    return button
  }
}

/** @param {string} id */
function named(id) {
  const row = term.get(id)
  return row ? (inChinese() ? row.zh : capitalised(row.en)) : id
}

/** A term in the other language. @param {string} id */
function other(id) {
  const row = term.get(id)
  return row ? (inChinese() ? capitalised(row.en) : row.zh) : ''
}

/** @param {string} id */
function groupOf(id) {
  const group = GROUPS.find((row) => row.id === term.get(id)?.group)
  return group ? (inChinese() ? group.zh : group.en) : ''
}

/** @returns {Record<string, string[]>} whatever the settings hold, as far as it is looks */
function ownLooks() {
  const kept = app.extensionManager.setting.get(LOOKS_SETTING)
  const rows = kept && typeof kept === 'object' && !Array.isArray(kept) ? Object.entries(kept) : []
  return Object.fromEntries(rows.filter(([, ids]) => Array.isArray(ids)).map(([name, ids]) => [name, inOrder(ids)]))
}

/** @param {Record<string, string[]>} looks */
function keepLooks(looks) {
  return app.extensionManager.setting.set(LOOKS_SETTING, looks)
}
