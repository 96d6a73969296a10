import { execFileSync } from "node:child_process"
import { assert, describe, it } from "@effect/vitest"
import { tarEntry } from "../../../src/platform/tarEntry.ts"

const tar =
  (...args: ReadonlyArray<string>) =>
  (input: Uint8Array) =>
    execFileSync("tar", args, { input, env: { LC_ALL: "C", TZ: "UTC", PATH: process.env["PATH"] } }).toString()

describe("a file as a tar entry", () => {
  it("is what tar lists and unpacks, whatever its size", () => {
    for (const size of [0, 1, 511, 512, 513, 100_000]) {
      const content = "x".repeat(size)
      const archive = tarEntry("./machinen-config.json", Buffer.from(content))
      assert.match(
        tar("-tvf", "-", "--numeric-owner")(archive),
        new RegExp(`^-rw-r--r-- 0/0 +${size} 1970-01-01 00:00 \\./machinen-config\\.json\\n$`)
      )
      assert.strictEqual(tar("-xOf", "-")(archive), content)
    }
  })
})
