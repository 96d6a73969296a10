import { spawnSync } from "node:child_process"
import { mkdirSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { cli, cliPath, environment, temporaryDirectory, temporaryHome } from "../fixtures.ts"

const root = path.resolve(import.meta.dirname, "..", "..")
const home = temporaryHome()

const run = (command: string, args: ReadonlyArray<string>, cwd: string) =>
  spawnSync(command, args, { cwd, encoding: "utf8", env: { ...process.env, ...environment(home) } })

describe("the CLI in a checkout", () => {
  it.live("paths are relative to where npm was called", () =>
    Effect.gen(function* () {
      yield* cli(home, ["boot", "-d", "--image", "micro", "--name", "here"])
      yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "here"]))
      const dir = temporaryDirectory()
      mkdirSync(path.join(dir, "sub"))
      writeFileSync(path.join(dir, "sub", "note"), "from below\n")
      const npm = (...args: ReadonlyArray<string>) =>
        run("npm", ["--prefix", root, "run", "--silent", "machinen", "--", ...args], path.join(dir, "sub"))
      const there = npm("cp", "note", "here:/tmp/")
      assert.deepStrictEqual([there.status, there.stderr], [0, ""])
      const back = npm("cp", "here:/tmp/note", "back")
      assert.deepStrictEqual([back.status, back.stderr], [0, ""])
      assert.strictEqual(readFileSync(path.join(dir, "sub", "back"), "utf8"), "from below\n")
    }).pipe(Effect.scoped)
  )

  for (const flag of ["--env-file", "--env-file-if-exists"]) {
    it(`${flag} is refused by machinen, not taken by Node`, () => {
      const args = ["run", flag, "/no/such/file", "--", "true"]
      for (const { status, stderr, stdout } of [
        run(cliPath, args, root),
        run("npm", ["run", "--silent", "machinen", "--", ...args], root)
      ]) {
        assert.deepStrictEqual([status, stdout], [125, ""])
        assert.match(stderr, new RegExp(`^machinen: \\(PARSE_FLAG_UNKNOWN\\): there is no option ${flag}$`, "m"))
        assert.notInclude(stderr, "/no/such/file")
      }
    })
  }
})
