/** The part of ComfyUI's public frontend interface that this pack uses; read by editors only. */

declare module '*/scripts/app.js' {
  export const app: { registerExtension(extension: Extension): void }
}

interface Extension {
  name: string
  nodeCreated?(node: Node): void
  getNodeMenuItems?(node: Node): MenuItem[]
}

interface Node {
  comfyClass?: string
  widgets?: Widget[]
  onConfigure?: (...args: unknown[]) => void
  setDirtyCanvas(foreground: boolean, background?: boolean): void
}

interface Widget {
  name: string
  value: unknown
  label?: string
  disabled?: boolean
  options: Record<string, unknown>
  callback?: (...args: unknown[]) => unknown
}

interface MenuItem {
  content: string
  callback?: () => void
  submenu?: { options: MenuItem[] }
}
