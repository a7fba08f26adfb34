/**
 * The presets of Wan Sampler. Written by scripts/make_presets.py from wan_core/sampling/presets.py: edit that.
 * @type {Record<string, { says: string, values: Record<string, number | string> }>}
 */
export const SAMPLER = {
  'T2V-A14B': {
    says: 'solver unipc, schedule auto, 40 steps, shift 12, cfg 4 (high noise) and 3 (low noise)',
    values: { steps: 40, cfg_high: 4, cfg_low: 3, shift: 12, solver: 'unipc', schedule: 'auto' }
  },
  'I2V-A14B': {
    says: 'solver unipc, schedule auto, 40 steps, shift 5, cfg 3.5',
    values: { steps: 40, cfg_high: 3.5, cfg_low: 3.5, shift: 5, solver: 'unipc', schedule: 'auto' }
  },
  'TI2V-5B': {
    says: 'solver unipc, schedule auto, 50 steps, shift 5, cfg 5',
    values: { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 T2V-1.3B': {
    says: 'solver unipc, schedule auto, 50 steps, shift 8, cfg 6',
    values: { steps: 50, cfg_high: 6, cfg_low: 6, shift: 8, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 T2V-14B': {
    says: 'solver unipc, schedule auto, 50 steps, shift 5, cfg 5',
    values: { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 T2I-14B': {
    says: 'solver unipc, schedule auto, 50 steps, shift 5, cfg 5',
    values: { steps: 50, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 I2V-14B': {
    says: 'solver unipc, schedule auto, 40 steps, shift 5, cfg 5',
    values: { steps: 40, cfg_high: 5, cfg_low: 5, shift: 5, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 I2V-14B 480P': {
    says: 'solver unipc, schedule auto, 40 steps, shift 3, cfg 5',
    values: { steps: 40, cfg_high: 5, cfg_low: 5, shift: 3, solver: 'unipc', schedule: 'auto' }
  },
  'Wan2.1 FLF2V-14B': {
    says: 'solver unipc, schedule auto, 50 steps, shift 16, cfg 5',
    values: { steps: 50, cfg_high: 5, cfg_low: 5, shift: 16, solver: 'unipc', schedule: 'auto' }
  },
  'LightX2V-4step': {
    says: 'solver euler, schedule simple, 4 steps, shift 5, cfg 1, noise levels 1, 0.9375, 0.8333, 0.625, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, shift: 5, solver: 'euler', schedule: 'simple' }
  },
  'Self-Forcing-4step': {
    says: 'solver lcm, schedule self-forcing, 4 steps, shift 5, cfg 1, noise levels 1, 0.9375, 0.8333, 0.625, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, shift: 5, solver: 'lcm', schedule: 'self-forcing' }
  },
  'FastWan-1.3B-3step': {
    says: 'solver lcm, schedule fastwan, 3 steps, shift 8, cfg 1, noise levels 1, 0.7568, 0.5217, 0',
    values: { steps: 3, cfg_high: 1, cfg_low: 1, shift: 8, solver: 'lcm', schedule: 'fastwan' }
  },
  'FastWan-5B-3step': {
    says: 'solver lcm, schedule fastwan, 3 steps, shift 5, cfg 1, noise levels 1, 0.7571, 0.5216, 0',
    values: { steps: 3, cfg_high: 1, cfg_low: 1, shift: 5, solver: 'lcm', schedule: 'fastwan' }
  },
  'CausVid-9step': {
    says: 'solver lcm, schedule causvid, 9 steps, shift 1, cfg 1, noise levels 0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074, 0',
    values: { steps: 9, cfg_high: 1, cfg_low: 1, shift: 1, solver: 'lcm', schedule: 'causvid' }
  },
  'rCM-T2V-4step': {
    says: 'solver lcm, schedule rcm-80, 4 steps, cfg 1, noise levels 0.9877, 0.9338, 0.8529, 0.609, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, solver: 'lcm', schedule: 'rcm-80' }
  },
  'rCM-T2V-4step-ODE': {
    says: 'solver euler, schedule rcm-80, 4 steps, cfg 1, noise levels 0.9877, 0.9338, 0.8529, 0.609, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, solver: 'euler', schedule: 'rcm-80' }
  },
  'rCM-I2V-4step': {
    says: 'solver lcm, schedule rcm-200, 4 steps, cfg 1, noise levels 0.995, 0.9338, 0.8529, 0.609, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, solver: 'lcm', schedule: 'rcm-200' }
  },
  'rCM-I2V-4step-ODE': {
    says: 'solver euler, schedule rcm-200, 4 steps, cfg 1, noise levels 0.995, 0.9338, 0.8529, 0.609, 0',
    values: { steps: 4, cfg_high: 1, cfg_low: 1, solver: 'euler', schedule: 'rcm-200' }
  }
}
