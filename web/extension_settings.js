/**
 * Where Wan Prompt Extend finds its servers: nodes/extend.py reads these from the user's settings. They are no widgets,
 * so that no workflow holds a key, or sends one elsewhere.
 */

const CATEGORY = 'Wan'
const GROUP = 'Prompt extension'

/**
 * @param {string} id
 * @param {string} name
 * @param {string} tooltip
 * @param {Setting['type']} type
 * @returns {Setting}
 */
const setting = (id, name, tooltip, type) => ({
  id: `wan_core.PromptExtension.${id}`,
  name,
  category: [CATEGORY, GROUP, id],
  tooltip,
  defaultValue: '',
  type
})

/** @type {Setting[]} */
export const extensionSettings = [
  setting('OpenAIAddress', 'OpenAI-compatible server: address',
    'Such as http://127.0.0.1:11434/v1. Empty: api.openai.com.', 'text'),
  setting('OpenAIKey', 'OpenAI-compatible server: key',
    'Kept as plain text in ComfyUI\'s settings file; the environment variable OPENAI_API_KEY is safer.', secret),
  setting('DashScopeAddress', 'DashScope: address',
    'Empty: dashscope.aliyuncs.com. Outside China: https://dashscope-intl.aliyuncs.com/api/v1.', 'text'),
  setting('DashScopeKey', 'DashScope: key',
    'Kept as plain text in ComfyUI\'s settings file; the environment variable DASH_API_KEY is safer.', secret)
]

/**
 * A field whose content is not shown.
 * @param {string} name
 * @param {(value: string) => void} set
 * @param {string} value
 */
function secret(name, set, value) {
  const field = document.createElement('input')
  field.type = 'password'
  field.autocomplete = 'off'
  field.value = value ?? ''
  field.ariaLabel = name
  field.className = 'p-inputtext p-component'
  field.addEventListener('change', () => set(field.value.trim()))
  return field
}
