// @ts-check
/// <reference path="./types.d.ts" />
import { app } from '../../scripts/app.js'
import { watchExpertSwitch } from './expert_switch.js'
import { LENGTH, SAMPLER, SIZE } from './presets.js'
import { presetMenu } from './widgets.js'

const SIZED = ['WanCoreEmptyLatent', 'WanCoreImageToVideo']

app.registerExtension({
  name: 'wan_core.Nodes',

  nodeCreated(node) {
    if (node.comfyClass === 'WanCoreExpertSwitch') watchExpertSwitch(node)
  },

  getNodeMenuItems(node) {
    if (node.comfyClass === 'WanCoreSampler') return [presetMenu(node, 'Wan: official settings', SAMPLER)]
    if (SIZED.includes(node.comfyClass ?? ''))
      return [presetMenu(node, 'Wan: size', SIZE), presetMenu(node, 'Wan: length', LENGTH)]
    return []
  }
})
