import type { Plugin } from "@opencode-ai/plugin"

// Files that hold secrets; .env.example and its like are meant to be read.
const SECRET = /(^|[\s/"'=<`(:])(\.env(?!\.(example|sample|template)\b)(\.[\w-]+)*|id_(rsa|ecdsa|ed25519)|[\w.-]+\.(pem|key))(?=$|[\s"'`;|&)>])/

// The argument of each tool that names what it reads.
const READS: Record<string, string[]> = {
  bash: ["command"],
  grep: ["path", "include"],
  read: ["filePath"],
}

/** Refuses tool calls that would put secrets into the conversation. A guard against accidents, not against intent. */
export const Secrets: Plugin = async () => ({
  "tool.execute.before": async (input, output) => {
    for (const name of READS[input.tool] ?? []) {
      const hit = SECRET.exec(String(output.args?.[name] ?? ""))
      if (hit) throw new Error(`${hit[2]} may hold secrets: refused. Ask the user for the names you need, without values.`)
    }
  },
})
