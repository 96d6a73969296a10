import { spawnSync } from "node:child_process"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { executable, temporaryDirectory } from "../../fixtures.ts"

const script = path.resolve(import.meta.dirname, "..", "..", "..", ".ci", "run")

/** CI with an `npm` that prints and ends as it is told: how it ended, and its last line. */
const ci = (tests: string, fresh: string, ci = "true") => {
  const dir = temporaryDirectory()
  executable(dir, "npm", `case "$*" in ci) ${ci} ;; test) ${tests} ;; "run test:fresh") ${fresh} ;; esac`)
  const { status, stdout } = spawnSync(script, [], {
    encoding: "utf8",
    env: { ...process.env, PATH: `${dir}:${process.env["PATH"]}` }
  })
  return [status, stdout.trimEnd().split("\n").at(-1)]
}

const tests = "echo '✔ x: 1 passed, 0 failed'; echo '10 passed, 0 failed, 2 skipped'"
const fresh = "echo 'fresh root bookworm: 9 passed, 0 failed'"

describe(".ci/run", () => {
  it("ends with the sum of the tests and the fresh root", () => {
    assert.deepStrictEqual(ci(tests, fresh), [0, "19 passed, 0 failed, 2 skipped"])
    assert.deepStrictEqual(ci("echo '10 passed, 0 failed'", fresh), [0, "19 passed, 0 failed"])
  })

  it("fails, and goes on, when either fails", () => {
    assert.deepStrictEqual(ci("echo '9 passed, 1 failed'; exit 1", fresh), [1, "18 passed, 1 failed"])
    assert.deepStrictEqual(ci(tests, "echo 'fresh root bookworm: 7 passed, 2 failed'; exit 1"), [
      1,
      "17 passed, 2 failed, 2 skipped"
    ])
  })

  it("counts what ended without a count as failed", () => {
    assert.deepStrictEqual(ci("echo '10 passed, 0 failed'; echo killed; exit 137", fresh), [1, "9 passed, 1 failed"])
    assert.deepStrictEqual(ci(tests, "echo 'x'; exit 70"), [1, "10 passed, 1 failed, 2 skipped"])
    assert.deepStrictEqual(ci("true", "true")[1], "0 passed, 2 failed")
    assert.strictEqual(ci(tests, fresh, "exit 1")[0], 1)
  })
})
