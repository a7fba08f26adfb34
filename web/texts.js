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
    left: '{0} left'
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
    left: '剩余 {0}'
  }
}

/** Short texts in the language of the interface, which ComfyUI's own translations do not reach. */
export function texts() {
  const language = String(app.extensionManager.setting.get('Comfy.Locale') ?? 'en')
  return language.startsWith('zh') ? TEXTS.zh : TEXTS.en
}
