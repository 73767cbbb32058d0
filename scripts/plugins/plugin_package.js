// Tools and plugins of a project import @opencode-ai/plugin from its .opencode/node_modules. OpenCode installs it there by
// npm, which fails without a network. This copies the image's package; scripts/opencode does the same for the
// projects that exist at start, before OpenCode looks.
import { cpSync, existsSync } from "node:fs"
import { join } from "node:path"

const PACKAGE = "/usr/local/lib/opencode-plugin"

export const PluginPackage = async ({ directory, worktree }) => {
  for (const project of new Set([directory, worktree])) {
    const target = join(project, ".opencode")
    if (!existsSync(target) || existsSync(join(target, "node_modules"))) continue
    try {
      cpSync(PACKAGE, target, { recursive: true, force: false })
    } catch (error) {
      console.error(`plugin_package: ${target}: ${error.message}`)
    }
  }
  return {}
}
