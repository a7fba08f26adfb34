/** The part of ComfyUI's public frontend interface that this pack uses; read by editors only. */

declare module '*/scripts/app.js' {
  export const app: {
    registerExtension(extension: Extension): void
    extensionManager: { setting: { get(id: string): unknown; set(id: string, value: unknown): Promise<void> } }
    canvas: {
      canvas: HTMLCanvasElement
      ds: { scale: number; offset: [number, number] }
      selected_nodes: Record<string, GraphNode>
      processMouseWheel(event: WheelEvent): void
    }
    rootGraph?: Graph
    isGraphReady?: boolean
    graph: Graph
  }
}

declare module '*/scripts/api.js' {
  export const api: {
    addEventListener(type: string, listener: (event: CustomEvent) => void): void
    fetchApi(route: string): Promise<Response>
  }
}

interface Graph {
  id?: string
  getNodeById(id: string): GraphNode | null | undefined
}

declare const LiteGraph: {
  ContextMenu: {
    new (items: MenuItem[], options: { event: MouseEvent }): unknown
    prototype: { addItem(name: string | null, value: unknown, options?: unknown): HTMLElement }
  }
}

interface Extension {
  name: string
  commands?: { id: string; label: string; icon: string; function: () => void }[]
  settings?: Setting[]
  nodeCreated?(node: GraphNode): void
  setup?(): void
  afterConfigureGraph?(): void
  onNodeOutputsUpdated?(outputs: Record<string, { text?: unknown } | undefined>): void
  getNodeMenuItems?(node: GraphNode): MenuItem[]
  getSelectionToolboxCommands?(item: GraphNode): string[]
}

interface Setting {
  id: string
  name: string
  category?: string[]
  tooltip?: string
  defaultValue: unknown
  sortOrder?: number
  type: 'hidden' | ((name: string, set: (value: string) => void, value: string) => HTMLElement)
}

interface GraphNode {
  comfyClass?: string
  pos: [number, number]
  size: [number, number]
  widgets?: Widget[]
  inputs?: { name: string; link?: unknown }[]
  properties: Record<string, unknown>
  subgraph?: Graph
  computeSize(): [number, number]
  setSize(size: [number, number]): void
  addDOMWidget(name: string, type: string, element: HTMLElement, options: DOMWidgetOptions): Widget
  onConnectionsChange?: (...args: unknown[]) => void
  onRemoved?: (...args: unknown[]) => void
  onConfigure?: (...args: unknown[]) => void
  setDirtyCanvas(foreground: boolean, background?: boolean): void
}

interface Widget {
  name: string
  type?: string
  onClick?(...args: unknown[]): unknown
  value: unknown
  label?: string
  disabled?: boolean
  serialize?: boolean
  hidden?: boolean
  computeSize?: () => [number, number]
  options: { margin?: number; hidden?: boolean }
  callback?: (...args: unknown[]) => unknown
}

interface DOMWidgetOptions {
  serialize: boolean
  hideOnZoom: boolean
  hideInPanel?: boolean
  margin: number
  selectOn?: string[]
  getMinHeight(): number
  getMaxHeight(): number | undefined
}

interface MenuItem {
  content: string
  callback?: () => void
  has_submenu?: boolean
  submenu?: { options: MenuItem[] }
}
