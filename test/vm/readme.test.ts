import { spawn } from "node:child_process"
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { afterAll, assert, describe, it } from "vitest"
import { environment, leftovers, nothing, temporaryHome } from "../fixtures.ts"

const root = path.resolve(import.meta.dirname, "..", "..")
const readme = readFileSync(path.join(root, "README.md"), "utf8")
const fences = (language: string) =>
  [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, "gm"))].map(([, body = ""]) => body)

const home = temporaryHome()
const work = mkdtempSync(path.join(os.tmpdir(), "mn-readme-"))
afterAll(() => rmSync(work, { recursive: true, force: true }))

const run = (command: string, args: ReadonlyArray<string>, cwd: string) =>
  new Promise<{ code: number | null; output: string }>((resolve) => {
    const child = spawn(command, args, {
      cwd,
      env: { ...process.env, ...environment(home), PATH: `${path.join(work, "bin")}:${process.env["PATH"]}` },
      stdio: ["ignore", "pipe", "pipe"],
      timeout: 120_000,
      killSignal: "SIGKILL"
    })
    const output: Array<Buffer> = []
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk: Buffer) => output.push(chunk))
    child.on("close", (code) => resolve({ code, output: Buffer.concat(output).toString() }))
  })

describe("README", () => {
  it("has examples of both kinds", () => {
    assert.isAbove(fences("sh").length, 0)
    assert.isAbove(fences("ts").length, 0)
  })

  it("its shell session works", { timeout: 180_000 }, async () => {
    mkdirSync(path.join(work, "bin"), { recursive: true })
    const machinen = path.join(work, "bin", "machinen")
    writeFileSync(
      machinen,
      `#!/bin/sh\nexec "${process.execPath}" "${path.join(root, "scripts", "machinen.mjs")}" "$@"\n`
    )
    chmodSync(machinen, 0o755)
    for (const session of fences("sh")) {
      const { code, output } = await run("bash", ["-euo", "pipefail", "-c", session], work)
      assert.strictEqual(code, 0, output)
      assert.include(output, "FROM THE HOST")
      assert.include(output, "42")
      assert.match(output, /^15 index\.html$/m)
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
        const { code, output } = await run(path.join(root, "node_modules", ".bin", "tsx"), [file], root)
        assert.strictEqual(code, 0, output)
        assert.include(output, "hello, world")
      }
    } finally {
      rmSync(dir, { recursive: true, force: true })
    }
    assert.deepStrictEqual(leftovers(home), nothing)
  })
})
