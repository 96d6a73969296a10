import { spawn } from "node:child_process"
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { Effect } from "effect"
import { assert, describe, it } from "vitest"
import { environment, freePort, leftovers, nothing, temporaryHome } from "../fixtures.ts"

const root = path.resolve(import.meta.dirname, "..", "..")
const readme = readFileSync(path.join(root, "README.md"), "utf8")
const fences = (language: string) =>
  [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, "gm"))].map(([, body = ""]) => body)

const home = temporaryHome()
const work = temporaryHome()

const run = (command: string, args: ReadonlyArray<string>, cwd: string) =>
  new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
    const child = spawn(command, args, {
      cwd,
      env: { ...process.env, ...environment(home), PATH: `${path.join(work, "bin")}:${process.env["PATH"]}` },
      stdio: ["ignore", "pipe", "pipe"],
      timeout: 150_000,
      killSignal: "SIGKILL"
    })
    const output = { stdout: "", stderr: "" }
    for (const channel of ["stdout", "stderr"] as const) {
      child[channel].setEncoding("utf8").on("data", (chunk: string) => {
        output[channel] += chunk
      })
    }
    child.on("close", (code) => resolve({ code, ...output }))
  })

/** The commands of a session, each with what it says they print: the `#>` lines that follow. Nothing, where there are none. */
const stepsOf = (session: string) => {
  const steps: Array<{ command: string; prints: string }> = []
  for (const line of session.split("\n")) {
    const last = steps.at(-1)
    if (line.startsWith("#>") && last !== undefined) {
      last.prints += `${last.prints === "" ? "" : "\n"}${line.slice(3)}`
    } else if (line !== "" && !line.startsWith("#")) steps.push({ command: line, prints: "" })
  }
  return steps
}

const escapeRegExp = (text: string) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")

describe("README", () => {
  it("has examples of both kinds", () => {
    assert.isAbove(fences("sh").length, 0)
    assert.isAbove(fences("ts").length, 0)
  })

  it("its shell session prints what it says", { timeout: 180_000 }, async () => {
    mkdirSync(path.join(work, "bin"), { recursive: true })
    const machinen = path.join(work, "bin", "machinen")
    writeFileSync(
      machinen,
      `#!/bin/sh\nexec "${process.execPath}" "${path.join(root, "scripts", "machinen.mjs")}" "$@"\n`
    )
    chmodSync(machinen, 0o755)
    const port = await Effect.runPromise(freePort)
    for (const session of fences("sh")) {
      const steps = stepsOf(session.replaceAll("8080", String(port)))
      assert.isAbove(steps.filter(({ prints }) => prints !== "").length, 15)
      const script = steps.map(({ command }) => `printf '\\036'\n${command}`).join("\n")
      const { code, stderr, stdout } = await run("bash", ["-euo", "pipefail", "-c", script], work)
      const printed = stdout.split("\x1e").slice(1)
      for (const [index, { command, prints }] of steps.entries()) {
        const pattern = prints.split("...").map(escapeRegExp).join(".*")
        assert.match(printed[index]?.trimEnd() ?? "", new RegExp(`^${pattern}$`, "s"), `${command}\n${stderr}`)
      }
      assert.strictEqual(code, 0, stderr)
    }
    assert.deepStrictEqual(leftovers(home), nothing)
  })

  it("its program works", { timeout: 180_000 }, async () => {
    // inside the package, so that it finds itself by name
    const dir = mkdtempSync(path.join(root, "dist", "readme-"))
    try {
      for (const [index, program] of fences("ts").entries()) {
        const file = path.join(dir, `example${index}.ts`)
        writeFileSync(file, program)
        const { code, stderr, stdout } = await run(path.join(root, "node_modules", ".bin", "tsx"), [file], root)
        assert.strictEqual(code, 0, stderr)
        assert.match(
          stdout,
          [/^hello, world\n$/, /^Linux \d\S+ in \d+ bytes\nhello, world\n$/][index] ?? /^no such example$/
        )
      }
    } finally {
      rmSync(dir, { recursive: true, force: true })
    }
    assert.deepStrictEqual(leftovers(home), nothing)
  })
})
