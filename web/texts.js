import { app } from '../../scripts/app.js'

const TEXTS = {
  en: {
    settings: 'Wan: presets',
    size: 'Wan: size',
    length: 'Wan: length',
    boundary: { auto: 'boundary', timestep: 'below', step: 'from step', snr: 'from SNR' },
    expert: { high: 'high-noise expert', low: 'low-noise expert' },
    starting: 'starting…',
    step: 'step {0} of {1}',
    extrapolated: 'extrapolated',
    skipped: '{0} steps left out',
    left: '{0} left',
    palette: {
      find: 'Find terms: rim light, low angle…',
      looks: 'Looks',
      dice: 'Roll the dice',
      menus: 'Show or hide the menus',
      chosen: 'Chosen terms',
      prompt: 'The finished prompt',
      conflict: 'These contradict each other',
      remove: 'Remove',
      unknown: 'No such term:',
      save: 'Name for the chosen terms',
      keep: 'Save as look',
      seed: 'Seed',
      roll: 'Roll'
    }
  },
  zh: {
    settings: 'Wan：预设',
    size: 'Wan：尺寸',
    length: 'Wan：时长',
    boundary: { auto: '边界', timestep: '低于', step: '起始步', snr: '信噪比起' },
    expert: { high: '高噪声专家', low: '低噪声专家' },
    starting: '正在启动…',
    step: '第 {0} 步，共 {1} 步',
    extrapolated: '外推',
    skipped: '已省略 {0} 步',
    left: '剩余 {0}',
    palette: {
      find: '查找词语：轮廓光，低角度…',
      looks: '风格',
      dice: '掷骰子',
      menus: '显示或隐藏菜单',
      chosen: '已选词语',
      prompt: '完整提示词',
      conflict: '以下词语互相矛盾',
      remove: '移除',
      unknown: '没有这个词语：',
      save: '为所选词语命名',
      keep: '存为风格',
      seed: '种子',
      roll: '掷'
    }
  }
}

/** Short texts in the language of the interface, which ComfyUI's own translations do not reach. */
export function texts() {
  return inChinese() ? TEXTS.zh : TEXTS.en
}

export function inChinese() {
  return String(app.extensionManager.setting.get('Comfy.Locale') ?? 'en').startsWith('zh')
}
