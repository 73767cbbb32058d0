import { readdir, readFile } from "node:fs/promises"
import { extname, join } from "node:path"
import { tool } from "@opencode-ai/plugin"

const SKIPPED = new Set([".git", ".venv", "build", "dist", "node_modules", "target", "vendor"])
const MOST_FILES = 5000

// What a file at the top says about how this project is tested.
const RUNNERS: Record<string, (text: string) => string[]> = {
  "Cargo.toml": () => ["cargo test"],
  "Makefile": (text) => [...text.matchAll(/^(test|check|lint)[\w-]*:/gm)].map((match) => `make ${match[0].slice(0, -1)}`),
  "go.mod": () => ["go test ./..."],
  "package.json": (text) => Object.keys(JSON.parse(text).scripts ?? {}).map((name) => `npm run ${name}`),
  "pyproject.toml": (text) => (text.includes("pytest") ? ["python -m pytest"] : []),
}

async function count(folder: string, found: Map<string, number>): Promise<number> {
  let seen = 0
  for (const entry of await readdir(folder, { withFileTypes: true }).catch(() => [])) {
    if (seen >= MOST_FILES) break
    if (entry.isDirectory() && !SKIPPED.has(entry.name)) seen += await count(join(folder, entry.name), found)
    if (!entry.isFile()) continue
    const kind = extname(entry.name) || "no extension"
    found.set(kind, (found.get(kind) ?? 0) + 1)
    seen += 1
  }
  return seen
}

export default tool({
  description: "Say what this project is made of (files by kind) and which commands test it",
  args: {
    folder: tool.schema.string().optional().describe("Folder to look at; the project's own if left out"),
  },
  async execute(args, context) {
    const root = args.folder ?? context.directory ?? process.cwd()
    const found = new Map<string, number>()
    const seen = await count(root, found)
    const kinds = [...found].sort((one, other) => other[1] - one[1]).slice(0, 12)
    const commands: string[] = []
    for (const [name, read] of Object.entries(RUNNERS)) {
      const text = await readFile(join(root, name), "utf8").catch(() => undefined)
      if (text === undefined) continue
      try {
        commands.push(...read(text))
      } catch (error) {
        commands.push(`(${name} cannot be read: ${error})`)
      }
    }
    return [
      `${root}: ${seen} files${seen >= MOST_FILES ? " or more" : ""}`,
      ...kinds.map(([kind, number]) => `${number} ${kind}`),
      commands.length ? `Commands: ${commands.join("; ")}` : "No test command found.",
    ].join("\n")
  },
})
