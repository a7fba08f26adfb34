/**
 * The official settings of each model: the table VARIANTS of wan_core/config.py, which a test compares with this.
 * And those that the 4-step LoRAs were made for.
 */
export const SAMPLER = {
  'T2V-A14B': { steps: 40, cfg_high: 4, cfg_low: 3, shift: 12, solver: 'unipc', schedule: 'auto' },
  'I2V-A14B': { steps: 40, cfg_high: 3.5, cfg_low: 3.5, shift: 5, solver: 'unipc', schedule: 'auto' },
  'TI2V-5B': { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 T2V-1.3B': { steps: 50, cfg_high: 6, cfg_low: 6, shift: 8, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 T2V-14B': { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 T2I-14B': { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 I2V-14B': { steps: 40, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 I2V-14B 480P': { steps: 40, cfg_high: 5, cfg_low: 5, shift: 3, solver: 'unipc', schedule: 'auto' },
  'Wan2.1 FLF2V-14B': { steps: 50, cfg_high: 5, cfg_low: 5, shift: 16, solver: 'unipc', schedule: 'auto' },
  '4-step LoRA': { steps: 4, cfg_high: 1, cfg_low: 1, shift: 5, solver: 'euler', schedule: 'simple' }
}

export const SIZE = {
  '14B: 1280 × 720': { width: 1280, height: 720 },
  '14B: 720 × 1280': { width: 720, height: 1280 },
  '14B, 1.3B: 832 × 480': { width: 832, height: 480 },
  '14B, 1.3B: 480 × 832': { width: 480, height: 832 },
  '5B: 1280 × 704': { width: 1280, height: 704 },
  '5B: 704 × 1280': { width: 704, height: 1280 },
  'T2I-14B: 1024 × 1024': { width: 1024, height: 1024 }
}

export const LENGTH = {
  '14B, 1.3B: 5 s (81 frames at 16 fps)': { frames: 81 },
  '14B, 1.3B: 3 s (49 frames at 16 fps)': { frames: 49 },
  '5B: 5 s (121 frames at 24 fps)': { frames: 121 },
  '5B: 3 s (73 frames at 24 fps)': { frames: 73 },
  'One picture (1 frame)': { frames: 1 }
}
