import { execFileSync } from "node:child_process"
import {
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import type { BootOptions } from "../../src/domain/BootOptions.ts"
import { Machinen } from "../../src/Machinen.ts"
import { environment, live, settled, sh, temporaryDirectory, temporaryHome } from "../fixtures.ts"

const home = temporaryHome()
const cache = path.join(home, "cache")
const machine = live(home)
/** With a cache of its own, but what is known of the host: a probe would take its time. */
const withOwnCache = Layer.unwrapEffect(
  Effect.sync(() => {
    const shared = environment(home)["MACHINEN_CACHE_DIR"] ?? ""
    mkdirSync(cache, { recursive: true })
    for (const file of readdirSync(shared).filter((name) => name.startsWith("host-"))) {
      copyFileSync(path.join(shared, file), path.join(cache, file))
    }
    return live(home, { MACHINEN_CACHE_DIR: cache })
  })
)
const bundles = path.join(home, "bundles")
let made = 0
const fresh = () => path.join(bundles, String(made++))

const boot = (options: BootOptions = {}) =>
  Effect.flatMap(Machinen, (m) => Effect.map(m.boot({ image: "micro", ...options }), ({ vm }) => vm))

/** A directory with one of everything a tree may hold. */
const tree = (): string => {
  const dir = temporaryDirectory()
  mkdirSync(path.join(dir, "src", "deep"), { recursive: true })
  writeFileSync(path.join(dir, "src", "main.c"), "int main;\n")
  writeFileSync(path.join(dir, "src", "deep", "big"), Buffer.alloc(3_000_000, 7))
  writeFileSync(path.join(dir, "tool"), "#!/bin/sh\necho works\n")
  chmodSync(path.join(dir, "tool"), 0o755)
  chownSync(path.join(dir, "src", "main.c"), 1234, 4321)
  symlinkSync("../src/main.c", path.join(dir, "src", "link"))
  utimesSync(path.join(dir, "src", "main.c"), 1_600_000_000, 1_600_000_000)
  chmodSync(dir, 0o751)
  return dir
}

/** Everything about a tree that must not change. */
const look = (dir: string) =>
  execFileSync(
    "sh",
    ["-c", "find . -printf '%p %y %m %U %G %s %T@ %l\\n' | sort; find . -type f | sort | xargs sha256sum"],
    {
      cwd: dir,
      encoding: "utf8"
    }
  )

describe.sequential("a copy of a host directory", () => {
  afterEach(() => settled(home))

  it.scoped("is the directory as it was, can be written, and never changes it", () =>
    Effect.gen(function* () {
      const host = tree()
      const before = look(host)
      const vm = yield* boot({ mount: { host, guest: "/mnt//work/" } })
      const seen = yield* sh(
        vm,
        "cd /mnt/work; stat -c %a .; stat -c '%u:%g %Y' src/main.c; readlink src/link; ./tool; sha256sum <src/deep/big"
      )
      const sum = execFileSync("sha256sum", { input: readFileSync(path.join(host, "src/deep/big")), encoding: "utf8" })
      assert.deepStrictEqual(seen.split("\n"), ["751", "1234:4321 1600000000", "../src/main.c", "works", sum.trim()])
      yield* sh(
        vm,
        "cd /mnt/work; echo changed >>src/main.c; rm tool; mv src/deep src/moved; echo new >new; chmod 700 ."
      )
      writeFileSync(path.join(host, "later"), "")
      assert.strictEqual(yield* sh(vm, "cd /mnt/work; cat src/main.c new; ls"), "int main;\nchanged\nnew\nnew\nsrc")
      rmSync(path.join(host, "later"))
      utimesSync(host, statSync(host).atime, new Date())
      const unchanged = (text: string) => text.replace(/^\. .*\n/m, "")
      assert.strictEqual(unchanged(look(host)), unchanged(before))
      assert.deepStrictEqual(vm.entry.mount, { guest: "/mnt/work", host })
    }).pipe(Effect.provide(machine))
  )

  it.scoped("goes with its VM into bundles and forks, the directory and the cache being gone", () =>
    Effect.gen(function* () {
      const host = tree()
      const machinen = yield* Machinen
      const vm = yield* boot({ mount: { host, guest: "/mnt/work" } })
      yield* sh(
        vm,
        "cd /mnt/work; echo one >mine; rm tool; echo more >>src/main.c; (sleep 1000 <src/deep/big >/dev/null 2>&1 &)"
      )
      const lower = (vm.entry.disks ?? []).find(({ id }) => id === "mountlower")?.path ?? ""
      rmSync(host, { recursive: true })
      rmSync(path.join(cache, "mountdisk"), { recursive: true, force: true })
      const first = fresh()
      yield* machinen.snapshot(vm, { outDir: first, leaveRunning: true })
      assert.includeMembers(readdirSync(first), ["mountlower.img", "mountupper.img"])
      yield* sh(vm, "echo source >/mnt/work/mine")
      const expect = "one\nint main;\nmore\n../src/main.c"
      const state = "cd /mnt/work; cat mine src/main.c; readlink src/link; test ! -e tool"

      const { vm: copy } = yield* machinen.restore({ snapDir: first })
      assert.strictEqual(yield* sh(copy, state), expect)
      yield* sh(copy, "echo copy >/mnt/work/mine; sync")
      const { vm: again } = yield* machinen.restore({ snapDir: first })
      assert.strictEqual(yield* sh(again, state), expect)
      assert.deepStrictEqual(yield* machinen.verify(first), [])
      assert.deepStrictEqual(again.entry.mount, { guest: "/mnt/work", host })

      const { siblings } = yield* machinen.fork(copy)
      for (const { vm: sibling } of siblings) {
        assert.strictEqual(yield* sh(sibling, "cat /mnt/work/mine; wc -c </mnt/work/src/deep/big"), "copy\n3000000")
      }
      // a second generation, whose first is gone
      rmSync(first, { recursive: true })
      const second = fresh()
      yield* machinen.snapshot(copy, { outDir: second })
      const { vm: grandchild } = yield* machinen.restore({ snapDir: second })
      assert.strictEqual(yield* sh(grandchild, "cat /mnt/work/mine; wc -c </mnt/work/src/deep/big"), "copy\n3000000")
      assert.strictEqual(yield* sh(vm, "cat /mnt/work/mine"), "source")
      assert.isTrue(existsSync(lower))
    }).pipe(Effect.provide(withOwnCache))
  )
})
