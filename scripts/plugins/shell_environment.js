// An OpenCode plugin: secrets of the server are empty in the shells of agents and in the web terminal.
// OPENCODE_SHELL_KEEP lists names that they do get, separated by spaces, for example "GITHUB_TOKEN NPM_TOKEN".
// A command can still read /proc/PID/environ of the server, which has the same user: see docs/operations.md.

const SECRET = /(password|passwd|passphrase|secret|token|credentials?|key|key_id)$/i

export const ShellEnvironment = async () => ({
  "shell.env": async (_input, output) => {
    const kept = new Set((process.env.OPENCODE_SHELL_KEEP ?? "").split(/\s+/))
    for (const name of Object.keys(process.env)) {
      if (SECRET.test(name) && !kept.has(name)) output.env[name] = ""
    }
  },
})
