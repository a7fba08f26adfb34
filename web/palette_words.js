/** What wan_core/prompt/{palette,conflicts,compose}.py do, for the editor; a test compares the two. */

import { CONFLICTS, GROUPS, ROLLED, TERMS } from './palette_terms.js'

const ROLLS = 6
const SEPARATORS = /[,;，；、\n]/
const HAN = /[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}]/u
const SENTENCE_ENDS = ['.', '!', '?', '。', '！', '？', '…']

export const term = new Map(TERMS.map((row) => [row.id, row]))

const known = new Map(TERMS.map(({ id, group, en, zh, also }) => {
  const { id: gid, en: gen, zh: gzh } = /** @type {import('./palette_terms.js').Named} */ (
    GROUPS.find((row) => row.id === group))
  return [id, { names: [en, zh, id].map(plain), synonyms: also.map(plain), group: [gid, gen, gzh].map(plain) }]
}))

/**
 * Ids of the terms that a query may mean, the best first.
 * @param {string} query
 */
export function findTerms(query) {
  const wanted = plain(query)
  if (!wanted) return []
  const ranked = TERMS.map(({ id }) => ({ id, rank: rankOf(wanted, id) })).filter(({ rank }) => rank >= 0)
  return ranked.sort((a, b) => a.rank - b.rank).map(({ id }) => id)
}

/**
 * The terms that a line names, each the best match of what stands between two commas, and what names none.
 * @param {string} line
 */
export function readLine(line) {
  const parts = line.split(SEPARATORS).map((part) => part.trim()).filter(Boolean)
  const found = parts.map((part) => findTerms(part)[0])
  return { ids: found.filter(Boolean), unknown: parts.filter((_, place) => !found[place]) }
}

/**
 * Term ids of the palette's widget, and what in it is no term: an error when the node is queued.
 * @param {string} text
 */
export function parsePalette(text) {
  const parts = text.split(SEPARATORS).map((part) => part.trim()).filter(Boolean)
  const found = parts.map((part) => named(plain(part)))
  return { ids: [...new Set(found.flatMap((row) => (row ? [row.id] : [])))], unknown: parts.filter((_, place) => !found[place]) }
}

/** @param {string} name plain */
function named(name) {
  return TERMS.find(({ id }) => known.get(id)?.names.includes(name)) ??
    TERMS.find(({ id }) => known.get(id)?.synonyms.includes(name))
}

/**
 * The pairs of these terms that contradict each other.
 * @param {string[]} ids
 * @returns {[string, string][]}
 */
export function conflicts(ids) {
  const all = [...new Set(ids)]
  return all.flatMap((a, place) => all.slice(place + 1).filter((b) => contradict(a, b)).map(
    (b) => /** @type {[string, string]} */ ([a, b])))
}

/**
 * As many terms of different groups as look well: the same ones for the same seed.
 * @param {number} seed 0 ... 2^32 - 1
 */
export function roll(seed) {
  const below = numbers(seed)
  const groups = [...ROLLED]
  /** @type {string[]} */
  const found = []
  while (groups.length && found.length < ROLLS) {
    const [group] = groups.splice(below(groups.length), 1)
    const fitting = TERMS.filter((row) => row.group === group && !conflicts([...found, row.id]).length)
    if (fitting.length) found.push(fitting[below(fitting.length)].id)
  }
  return inOrder(found)
}

/**
 * Without repetitions, in the vocabulary's order.
 * @param {string[]} ids
 */
export function inOrder(ids) {
  return TERMS.filter(({ id }) => ids.includes(id)).map(({ id }) => id)
}

/**
 * The prompt that the node will make.
 * @param {string} text
 * @param {string[]} ids
 * @param {string} language
 * @param {string} placement
 */
export function compose(text, ids, language, placement) {
  const said = termsIn(text)
  const rows = TERMS.filter(({ id }) => ids.includes(id) && !said.has(id))
  const chinese = language === 'zh' || (language === 'auto' && HAN.test(text))
  const listed = chinese ? rows.map(({ zh }) => zh).join('，') : capitalised(rows.map(({ en }) => en).join(', '))
  const trimmed = text.trim()
  if (!rows.length || !trimmed) return listed || text
  if (placement === 'before') return `${listed}${chinese ? '，' : '. '}${trimmed}`
  const ended = SENTENCE_ENDS.some((end) => trimmed.endsWith(end))
  if (chinese) return `${trimmed}${ended ? '' : '，'}${listed}${ended ? '。' : ''}`
  return `${trimmed}${ended ? '' : '.'} ${listed}.`
}

/** @param {string} text */
export function capitalised(text) {
  return text.slice(0, 1).toUpperCase() + text.slice(1)
}

/**
 * @param {string} wanted
 * @param {string} id
 */
function rankOf(wanted, id) {
  const { names, synonyms, group } = /** @type {NonNullable<ReturnType<typeof known.get>>} */ (known.get(id))
  const words = wanted.split(' ')
  const begins = (/** @type {string} */ name) => {
    const have = name.split(' ')
    return words.every((word) => have.some((part) => part.startsWith(word)))
  }
  return [
    names.includes(wanted),
    synonyms.includes(wanted),
    names.some((name) => name.startsWith(wanted)),
    names.some(begins),
    synonyms.some(begins),
    !/^[\x00-\x7f]?$/.test(wanted) && [...names, ...synonyms].some((name) => name.includes(wanted)),
    group.includes(wanted)
  ].indexOf(true)
}

/** @param {string} text */
function plain(text) {
  return text.toLowerCase().replace(/[\s_-]+/g, ' ').trim().replaceAll('colour', 'color').replaceAll('’', "'")
}

/**
 * @param {string} a
 * @param {string} b
 */
function contradict(a, b) {
  return CONFLICTS.some((row) => {
    const holds = (/** @type {string} */ id) => row.some((answer) => answer.includes(id))
    return holds(a) && holds(b) && !row.some((answer) => answer.includes(a) && answer.includes(b))
  })
}

/** @param {number} seed */
function numbers(seed) {
  let state = (Math.imul(seed, 0x9e3779b1) + 0x7f4a7c15) >>> 0 || 1
  return (/** @type {number} */ end) => {
    state ^= state << 13
    state ^= state >>> 17
    state = (state ^ (state << 5)) >>> 0
    return state % end
  }
}

const wordings = new Map(TERMS.flatMap(({ id, en, zh }) => [[en.toLowerCase(), id], [zh.toLowerCase(), id]]))
const anyWording = new RegExp([...wordings.keys()].sort((a, b) => b.length - a.length).map(whole).join('|'), 'giu')

/**
 * Whole words in English; Chinese has no gaps between words to look for.
 * @param {string} wording
 */
function whole(wording) {
  const escaped = wording.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')
  return /^[\x00-\x7f]+$/.test(wording) ? `(?<![\\p{L}\\p{N}_])${escaped}(?![\\p{L}\\p{N}_])` : escaped
}

/**
 * Ids of the terms that a text names already.
 * @param {string} text
 */
function termsIn(text) {
  return new Set([...text.matchAll(anyWording)].map(([match]) => wordings.get(match.toLowerCase())))
}
