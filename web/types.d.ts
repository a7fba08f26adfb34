/** The part of ComfyUI's public frontend interface that this pack uses; read by editors only. */

declare module '*/scripts/app.js' {
  export const app: {
    registerExtension(extension: Extension): void
    extensionManager: { setting: { get(id: string): unknown } }
    canvas: {
      canvas: HTMLCanvasElement
      ds: { scale: number; offset: [number, number] }
      selected_nodes: Record<string, Node>
    }
  }
}

declare const LiteGraph: {
  ContextMenu: new (items: MenuItem[], options: { event: MouseEvent }) => unknown
}

interface Extension {
  name: string
  commands?: { id: string; label: string; icon: string; function: () => void }[]
  nodeCreated?(node: Node): void
  getNodeMenuItems?(node: Node): MenuItem[]
  getSelectionToolboxCommands?(item: Node): string[]
}

interface Node {
  comfyClass?: string
  pos: [number, number]
  widgets?: Widget[]
  onConfigure?: (...args: unknown[]) => void
  setDirtyCanvas(foreground: boolean, background?: boolean): void
}

interface Widget {
  name: string
  value: unknown
  label?: string
  disabled?: boolean
  callback?: (...args: unknown[]) => unknown
}

interface MenuItem {
  content: string
  callback?: () => void
  has_submenu?: boolean
  submenu?: { options: MenuItem[] }
}
