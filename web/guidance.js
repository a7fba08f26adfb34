import { greyUnread } from './widgets.js'

/** Which inputs of Wan Guidance a rule reads. */
const READS = {
  interval: ['sigma_start', 'sigma_end'],
  nag: ['nag_scale', 'nag_tau', 'nag_alpha'],
  slg: ['sigma_start', 'sigma_end', 'blocks'],
  cfg_zero_star: ['zero_steps'],
  apg: ['momentum', 'norm_threshold', 'eta']
}

/** @param {GraphNode} node */
export function watchGuidance(node) {
  greyUnread(node, 'rule', READS)
}
