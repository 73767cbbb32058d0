// OpenAgents' agents must read .opencode/context/... of the project first. A project that has no such file gets
// the image's: the path in the tool's arguments is replaced before the tool runs.
import { existsSync } from "node:fs"
import { isAbsolute, join, relative } from "node:path"

const OPENAGENTS = "/opt/openagents"
const ARGUMENTS = { read: "filePath", list: "path", glob: "path", grep: "path" }

export const OpenAgentsContext = async ({ directory }) => {
  // Returns the image's copy of a path under .opencode, if only the image has it.
  const replacement = (path) => {
    const local = isAbsolute(path) ? relative(directory, path) : path
    const copy = join(OPENAGENTS, local)
    if (!/^(\.\/)?\.opencode\//.test(local + "/") || existsSync(join(directory, local))) return undefined
    return copy.startsWith(`${OPENAGENTS}/.opencode`) && existsSync(copy) ? copy : undefined
  }
  return {
    "tool.execute.before": async ({ tool }, { args }) => {
      const name = ARGUMENTS[tool]
      if (!name) return
      if (args[name]) {
        args[name] = replacement(args[name]) ?? args[name]
      } else if (tool === "glob") {
        // A pattern such as .opencode/context/**/*.md: search the image when the project has no such directory.
        const fixed = args.pattern?.match(/^[^*?[{]*(?=\/)/)?.[0]
        if (fixed && replacement(fixed)) args.path = OPENAGENTS
      }
    },
  }
}
