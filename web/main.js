import { app } from '../../scripts/app.js'
import { listAsText } from './combos.js'
import { watchExpertSwitch } from './expert_switch.js'
import { extensionSettings } from './extension_settings.js'
import { watchGuidance } from './guidance.js'
import { openPresets, presetsOf } from './menus.js'
import { addPalette, paletteSettings } from './palette.js'
import { addPreview, watchPreviews } from './preview.js'
import { watchPreset } from './sampler_preset.js'
import { addText, restoreTexts, showOutputs, watchTexts } from './says.js'
import { watchStepCache } from './step_cache.js'

watchPreviews() // now, not in setup(): before the frontend itself listens to what it passes on
watchTexts()

let restored = false

app.registerExtension({
  name: 'wan_core.Nodes',

  settings: [...extensionSettings, ...paletteSettings],

  commands: [
    { id: 'wan_core.Presets', label: 'Wan: presets', icon: 'pi pi-sliders-h', function: openPresets }
  ],

  nodeCreated(node) {
    if (node.comfyClass === 'WanCoreExpertSwitch') watchExpertSwitch(node)
    if (node.comfyClass === 'WanCoreSampler') addPreview(node)
    if (node.comfyClass === 'WanCoreAestheticPrompt') addPalette(node)
    if (node.comfyClass?.startsWith('WanCore')) {
      listAsText(node)
      addText(node)
    }
    if (node.comfyClass === 'WanCoreSampler') watchPreset(node)
    if (node.comfyClass === 'WanCoreStepCache') watchStepCache(node)
    if (node.comfyClass === 'WanCoreGuidance') watchGuidance(node)
  },

  afterConfigureGraph() {
    if (!restored) void restoreTexts() // the graph that was open before the page was loaded again
    restored = true
  },

  onNodeOutputsUpdated: showOutputs,

  getNodeMenuItems: presetsOf,

  getSelectionToolboxCommands: (item) => (presetsOf(item).length ? ['wan_core.Presets'] : [])
})
