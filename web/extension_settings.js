/**
 * Where Wan Prompt Extend finds its servers: nodes/extend.py reads these from the user's settings. They are no widgets,
 * so that no workflow holds a key, or sends one elsewhere.
 */

const CATEGORY = 'Wan'
const GROUP = 'Prompt extension'

const STYLE = `width: 20rem; max-width: 100%; box-sizing: border-box; padding: 6px 10px; border-radius: 6px; font: inherit;
  border: 1px solid var(--border-color); background: var(--comfy-input-bg); color: var(--input-text)`

/**
 * @param {string} id
 * @param {number} place
 * @param {'text' | 'password'} kind
 * @param {string} name
 * @param {string} tooltip
 * @returns {Setting}
 */
const setting = (id, place, kind, name, tooltip) => ({
  id: `wan_core.PromptExtension.${id}`,
  name,
  category: [CATEGORY, GROUP, id],
  sortOrder: -place,
  tooltip,
  defaultValue: '',
  type: (_, set, value) => field(kind, name, set, value)
})

/** @type {Setting[]} */
export const extensionSettings = [
  setting('OpenAIAddress', 1, 'text', 'OpenAI-compatible server: address',
    'Such as http://127.0.0.1:11434/v1. Empty: api.openai.com.'),
  setting('OpenAIKey', 2, 'password', 'OpenAI-compatible server: key',
    'Kept as plain text in ComfyUI\'s settings file; the environment variable OPENAI_API_KEY is safer.'),
  setting('DashScopeAddress', 3, 'text', 'DashScope: address',
    'Empty: dashscope.aliyuncs.com. Outside China: https://dashscope-intl.aliyuncs.com/api/v1.'),
  setting('DashScopeKey', 4, 'password', 'DashScope: key',
    'Kept as plain text in ComfyUI\'s settings file; the environment variable DASH_API_KEY is safer.')
]

/**
 * Wide enough for an address, and of a kind that ComfyUI's own fields do not have: its content is not shown.
 * @param {'text' | 'password'} kind
 * @param {string} name
 * @param {(value: string) => void} set
 * @param {string} value
 */
function field(kind, name, set, value) {
  const input = document.createElement('input')
  input.type = kind
  input.autocomplete = 'off'
  input.spellcheck = false
  input.value = value ?? ''
  input.ariaLabel = name
  input.style.cssText = STYLE
  input.addEventListener('change', () => set(input.value.trim()))
  return input
}
