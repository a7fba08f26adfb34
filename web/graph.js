import { app } from '../../scripts/app.js'

/** The graph that is open, with its subgraphs below it; before there is one, nothing, and no complaint of rootGraph. */
export function openGraph() {
  return app.isGraphReady === false ? undefined : (app.rootGraph ?? app.graph)
}

/**
 * A node by the id it runs under: "5", or "5:3" for node 3 in the subgraph of node 5.
 * @param {string} id
 * @returns {GraphNode | null | undefined}
 */
export function nodeOf(id) {
  const hosts = String(id).split(':')
  const last = /** @type {string} */ (hosts.pop())
  /** @type {Graph | undefined} */
  let graph = openGraph()
  for (const host of hosts) graph = graph?.getNodeById(host)?.subgraph
  return graph?.getNodeById(last)
}
