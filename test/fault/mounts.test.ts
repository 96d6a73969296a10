import { existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import {
  assertNothingLeftAfterNextCommand,
  cli,
  eventually,
  executable,
  newBundle,
  settled,
  startCli,
  temporaryDirectory,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** A host directory with something in it that nobody may remove. */
const shared = () => {
  const dir = path.join(temporaryDirectory(), "shared")
  mkdirSync(path.join(dir, "deep"), { recursive: true })
  writeFileSync(path.join(dir, "deep", "precious"), "precious")
  return dir
}
const intact = (dir: string) => assert.strictEqual(readFileSync(path.join(dir, "deep", "precious"), "utf8"), "precious")
const isMountedHere = (dir: string) => readFileSync("/proc/self/mountinfo", "utf8").includes(dir)

const boot = (dir: string) =>
  Effect.gen(function* () {
    yield* Effect.addFinalizer(() => cli(home, ["stop", "--force", "src"]))
    const args = ["boot", "-d", "--json", "--image", "micro", "--name", "src", "--mount-live", `${dir}:/mnt/s`]
    const { code, stderr, stdout } = yield* cli(home, args)
    assert.strictEqual(code, 0, stderr)
    return JSON.parse(stdout) as { readonly pid: number; readonly shimPid: number }
  })

describe("a shared directory", () => {
  for (const part of ["shimPid", "pid"] as const) {
    it.scopedLive(`is as it was after kill -9 of the ${part === "pid" ? "VMM" : "shim"}`, () =>
      Effect.gen(function* () {
        const dir = shared()
        const vm = yield* boot(dir)
        assert.isFalse(isMountedHere(dir) || isMountedHere(home))
        process.kill(vm[part], "SIGKILL")
        yield* assertNothingLeftAfterNextCommand(home)
        intact(dir)
      })
    )
  }

  for (const [what, file] of [
    ["memory is copied", "memory"],
    ["disks are copied", "upper.img"]
  ] as const) {
    it.scopedLive(`goes on in a source whose snapshot was killed while ${what}`, () =>
      Effect.gen(function* () {
        const dir = shared()
        yield* boot(dir)
        const bundle = newBundle()
        const starter = yield* startCli(home, ["snapshot", "--keep-alive", "src", bundle])
        yield* eventually(`a file ${file}`, () => lstatSync(path.join(bundle, file), { throwIfNoEntry: false }))
        yield* starter.kill("SIGKILL")
        assert.strictEqual((yield* starter.result).signal, "SIGKILL")
        const script = "cat /mnt/s/deep/precious && echo guest >/mnt/s/made"
        const { code, stdout } = yield* cli(home, ["exec", "src", "--", "sh", "-c", script])
        assert.deepStrictEqual([code, stdout], [0, "precious"])
        assert.strictEqual(readFileSync(path.join(dir, "made"), "utf8"), "guest\n")
        assert.strictEqual((yield* cli(home, ["fork", "src", "-d", "--new-name", "f"])).code, 0)
        assert.strictEqual((yield* cli(home, ["exec", "f", "--", "cat", "/mnt/s/made"])).stdout, "guest\n")
        yield* cli(home, ["stop", "--force", "f"])
      })
    )
  }

  it.scopedLive("that vanished between two snapshots' lives is told before anything is made", () =>
    Effect.gen(function* () {
      const dir = shared()
      yield* boot(dir)
      const bundle = newBundle()
      assert.strictEqual((yield* cli(home, ["snapshot", "src", bundle])).code, 0)
      const gone = `${dir}:/mnt/s`.replace("shared", "no-such")
      const { code, stderr } = yield* cli(home, ["restore", bundle, "-d", "--mount-live", gone])
      assert.notStrictEqual(code, 0)
      assert.include(stderr, "(BOOT_MOUNT_HOST_NOT_FOUND)")
    })
  )
})

describe("a copy of a directory", () => {
  it.scopedLive("whose maker is killed leaves nothing that counts, and the next one makes it", () =>
    Effect.gen(function* () {
      const dir = shared()
      const cache = path.join(temporaryDirectory(), "cache")
      const marker = path.join(temporaryDirectory(), "building")
      const slow = executable(
        temporaryDirectory(),
        "mksquashfs",
        `[ -e ${marker} ] && exec /usr/bin/mksquashfs "$@"; echo half >"$2"; echo >${marker}; exec sleep 1000`
      )
      const env = { MACHINEN_CACHE_DIR: cache, MACHINEN_MKSQUASHFS: slow, MACHINEN_ACCEL: "tcg" }
      const args = ["run", "--image", "micro", "-v", `${dir}:/mnt/c`, "--", "cat", "/mnt/c/deep/precious"]
      const starter = yield* startCli(home, args, { env })
      yield* eventually("a build", () => existsSync(marker))
      yield* starter.kill("SIGKILL")
      assert.strictEqual((yield* starter.result).signal, "SIGKILL")
      const complete = () => readdirSync(path.join(cache, "mountdisk")).filter((name) => name.endsWith(".ok"))
      assert.deepStrictEqual(complete(), [])
      const { code, stderr, stdout } = yield* cli(home, args, { env })
      assert.deepStrictEqual([code, stdout], [0, "precious"], stderr)
      assert.strictEqual(complete().length, 1)
      intact(dir)
    })
  )
})
