import { readdirSync, readFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"

/** Lower may not import higher. A file's rank is that of the first prefix it matches. */
const ranks: ReadonlyArray<readonly [prefix: string, rank: number]> = [
  ["src/domain/", 0],
  ["src/version.ts", 0],
  ["src/platform/", 1],
  ["src/runtime/", 5],
  ["src/Machinen.ts", 4],
  ["src/VmControl.ts", 4],
  ["src/cli/main.ts", 8],
  ["src/cli/", 7],
  ["src/index.ts", 8],
  ["src/promise.ts", 8],
  ["src/Sandboxes.ts", 7],
  ["src/Supervisor.ts", 7],
  ["src/bootPty.ts", 7],
  ["src/execPty.ts", 4],
  ["src/boot.ts", 3],
  ["src/templates.ts", 3],
  ["src/prepare.ts", 3],
  ["src/provision.ts", 3],
  ["src/restore.ts", 3],
  ["src/fork.ts", 3],
  ["src/snapshot.ts", 3],
  ["src/", 2],
  ["backends/", 4]
]
/** The facade's own: no Effect reaches those who call them. */
const promises = ["src/promise.ts", "src/Sandboxes.ts", "src/Supervisor.ts", "src/bootPty.ts"]
const rank = (file: string) => ranks.find(([prefix]) => file.startsWith(prefix))?.[1] ?? 99

const files = ["src", "backends"].flatMap((dir) =>
  readdirSync(dir, { recursive: true, encoding: "utf8" })
    .map((file) => path.join(dir, file))
    .filter((file) => file.endsWith(".ts"))
)
const imports = (file: string) =>
  [...readFileSync(file, "utf8").matchAll(/(?:from|import) "([^"]+)"/g)].map(([, target = ""]) => target)

describe("architecture", () => {
  it("imports only point downwards", () => {
    const wrong = files.flatMap((file) =>
      imports(file)
        .filter((target) => target.startsWith("."))
        .map((target) => path.normalize(path.join(path.dirname(file), target)))
        .filter((target) => rank(target) > rank(file))
        .map((target) => `${file} -> ${target}`)
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("only the wiring names a backend", () => {
    const wrong = files.filter(
      (file) =>
        !file.startsWith("backends/") &&
        file !== "src/runtime/layers.ts" &&
        imports(file).some((target) => target.includes("backends/"))
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("Node's processes and sockets are started in platform only", () => {
    const wrong = files.filter(
      (file) =>
        !file.startsWith("src/platform/") &&
        imports(file).some((target) => ["node:child_process", "node:net"].includes(target))
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("services neither print, nor exit, nor return promises", () => {
    const wrong = files
      .filter((file) => !file.startsWith("src/cli/") && !promises.includes(file))
      .flatMap((file) =>
        [/\bconsole\.(log|error|warn)\(/, /\bprocess\.exit\b/, /\bPromise</, /\basync (function|\()/]
          .filter((pattern) => pattern.test(readFileSync(file, "utf8")))
          .map((pattern) => `${file}: ${pattern}`)
      )
    assert.deepStrictEqual(wrong, [])
  })
})
