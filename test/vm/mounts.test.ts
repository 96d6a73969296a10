import { execFileSync } from "node:child_process"
import {
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
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
import type { ForkOptions } from "../../src/fork.ts"
import { Machinen } from "../../src/Machinen.ts"
import type { RestoreOptions } from "../../src/restore.ts"
import type { Vm } from "../../src/Vm.ts"
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

describe.sequential("a live mount", () => {
  afterEach(() => settled(home))

  const fork = (vm: Vm, options: ForkOptions = {}) =>
    Effect.flatMap(Machinen, (m) => Effect.map(m.fork(vm, options), ({ siblings }) => siblings))

  it.scoped("shows each side what the other does, with owners, modes and links", () =>
    Effect.gen(function* () {
      const [rw, ro] = [tree(), tree()]
      const vm = yield* boot({
        liveMounts: [
          { host: rw, guest: "/mnt/rw" },
          { host: ro, guest: "/mnt/deep/ro", mode: "ro" }
        ]
      })
      const state = "stat -c '%a %u:%g %Y' src/main.c; readlink src/link; cat src/link; ./tool; wc -c <src/deep/big"
      for (const at of ["/mnt/rw", "/mnt/deep/ro"]) {
        const seen = yield* sh(vm, `cd ${at}; ${state}`)
        assert.strictEqual(seen, "644 1234:4321 1600000000\n../src/main.c\nint main;\nworks\n3000000")
      }
      yield* sh(
        vm,
        "cd /mnt/rw; echo guest >made; chmod 604 made; chown 77:88 made; ln -s nowhere/at/all dangling; mkdir -m 2770 dir; " +
          "ln made dir/hard; mv tool dir/moved; rm src/link; touch -d @1500000000 made"
      )
      const made = statSync(path.join(rw, "made"))
      assert.deepStrictEqual(
        [made.uid, made.gid, made.mode & 0o7777, made.nlink, made.mtimeMs],
        [77, 88, 0o604, 2, 1.5e12]
      )
      assert.strictEqual(readFileSync(path.join(rw, "dir", "hard"), "utf8"), "guest\n")
      assert.strictEqual(statSync(path.join(rw, "dir")).mode & 0o7777, 0o2770)
      assert.strictEqual(readlinkSync(path.join(rw, "dangling")), "nowhere/at/all")
      assert.isTrue(existsSync(path.join(rw, "dir", "moved")) && !existsSync(path.join(rw, "tool")))
      // QEMU makes nothing but files, directories and links there
      assert.include(yield* sh(vm, "cd /mnt/rw; mkfifo x 2>&1; mknod x c 1 3 2>&1; mknod x b 8 0 2>&1; true"), "x: ")
      assert.isFalse(existsSync(path.join(rw, "x")))

      // a file that is open and one that is not
      const follow = yield* vm.start("exec 3</mnt/rw/made; read a <&3; echo $a; read b; read c <&3; echo $c")
      writeFileSync(path.join(rw, "made"), "host\nmore\n")
      writeFileSync(path.join(ro, "new"), "from the host")
      assert.strictEqual(yield* sh(vm, "cat /mnt/deep/ro/new /mnt/rw/made"), "from the hosthost\nmore")
      yield* Effect.ignore(follow.signal(9))
      rmSync(path.join(ro, "new"))
      assert.strictEqual(yield* sh(vm, "test -e /mnt/deep/ro/new || echo gone"), "gone")
      // not root
      yield* sh(vm, "chmod 777 /mnt/rw; su -s /bin/sh nobody -c 'echo x >/mnt/rw/theirs' 2>&1")
      assert.strictEqual(statSync(path.join(rw, "theirs")).uid, 65534)
      assert.deepStrictEqual(vm.entry.liveMounts, [
        { guest: "/mnt/rw", host: rw, mode: "rw" },
        { guest: "/mnt/deep/ro", host: ro, mode: "ro" }
      ])
    }).pipe(Effect.provide(machine))
  )

  it.scoped("read-only refuses every kind of change", () =>
    Effect.gen(function* () {
      const host = tree()
      const before = look(host)
      const vm = yield* boot({ liveMounts: [{ host, guest: "/mnt/ro", mode: "ro" }] })
      yield* sh(vm, "mount -o remount,rw /mnt/ro 2>/dev/null; true")
      const changes = [
        "echo x >>src/main.c",
        ": >src/main.c",
        ": >new",
        "mkdir new",
        "rm tool",
        "rmdir src/deep",
        "mv tool new",
        "ln tool new",
        "ln -s tool new",
        "chmod 600 tool",
        "chown 1:1 tool",
        "chown -h 1:1 src/link",
        "touch -d @1 tool",
        "truncate -s 1 tool",
        "mkfifo new",
        "mknod new c 1 3",
        "dd if=/dev/zero of=src/main.c bs=1 count=1 conv=notrunc",
        "mv src /mnt/ro/src/deep"
      ]
      const script = changes.map((change) => `(${change}) >/dev/null 2>&1 && echo '${change}'; true`).join("\n")
      assert.strictEqual(yield* sh(vm, `cd /mnt/ro\n${script}`), "")
      assert.include(yield* sh(vm, "touch /mnt/ro/new 2>&1 || true"), "Read-only file system")
      assert.strictEqual(look(host), before)
    }).pipe(Effect.provide(machine))
  )

  it.scoped("stays while its VM is saved and forked, and each copy has its own", () =>
    Effect.gen(function* () {
      const [one, two] = [tree(), tree()]
      const machinen = yield* Machinen
      const vm = yield* boot({
        liveMounts: [
          { host: one, guest: "/mnt/one" },
          { host: two, guest: "/mnt/two", mode: "ro" }
        ]
      })
      // a process beside the shares, and one that held a file before
      yield* sh(
        vm,
        "(while :; do sleep 0.01; done) >/dev/null 2>&1 & cat /mnt/one/src/main.c >/dev/null; grep 9p /proc/self/mountinfo >/tmp/before"
      )
      const dir = fresh()
      yield* machinen.snapshot(vm, { outDir: dir, leaveRunning: true })
      // never gone: the same mount
      assert.strictEqual(
        yield* sh(
          vm,
          "grep 9p /proc/self/mountinfo | diff - /tmp/before; echo still >/mnt/one/still; cat /mnt/one/still"
        ),
        "still"
      )

      const { rejuvenation, vm: copy } = yield* machinen.restore({ snapDir: dir })
      assert.include(rejuvenation.renewed, "shares")
      assert.strictEqual(yield* sh(copy, "echo copy >/mnt/one/copy; cat /mnt/one/still"), "still")
      assert.strictEqual(readFileSync(path.join(one, "copy"), "utf8"), "copy\n")
      assert.include(yield* sh(copy, "touch /mnt/two/x 2>&1 || true"), "Read-only file system")

      const other = tree()
      writeFileSync(path.join(other, "mine"), "other")
      const overridden = yield* machinen.restore({ snapDir: dir, liveMounts: [{ host: other, guest: "/mnt/two" }] })
      assert.strictEqual(yield* sh(overridden.vm, "cat /mnt/two/mine /mnt/one/still"), "otherstill")
      assert.include(yield* sh(overridden.vm, "touch /mnt/two/x 2>&1 || true"), "Read-only file system")
      const writable = yield* machinen.restore({
        snapDir: dir,
        liveMounts: [{ host: other, guest: "/mnt/two", mode: "rw" }]
      })
      yield* sh(writable.vm, "echo w >/mnt/two/x")
      assert.deepStrictEqual(writable.vm.entry.liveMounts, [
        { guest: "/mnt/one", host: one, mode: "rw" },
        { guest: "/mnt/two", host: other, mode: "rw" }
      ])

      // a copy's own copies, and siblings with a directory of their own
      const [sibling] = yield* fork(copy, { liveMounts: [{ host: other, guest: "/mnt/one" }] })
      assert.strictEqual(sibling === undefined ? "" : yield* sh(sibling.vm, "cat /mnt/one/mine"), "other")
      assert.strictEqual(yield* sh(copy, "cat /mnt/one/still"), "still")

      const refused = (options: Omit<RestoreOptions, "snapDir">) =>
        Effect.flip(Effect.asVoid(machinen.restore({ snapDir: dir, ...options })))
      const unknown = yield* refused({ liveMounts: [{ host: other, guest: "/mnt/three" }] })
      assert.strictEqual(unknown.code, "BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN")
      assert.include(unknown.hint, "/mnt/one, /mnt/two")
      rmSync(two, { recursive: true })
      assert.strictEqual((yield* refused({})).code, "BOOT_MOUNT_HOST_NOT_FOUND")
    }).pipe(Effect.provide(machine))
  )

  it.scoped("in use is told by name, and nothing is saved unless that was asked for", () =>
    Effect.gen(function* () {
      const host = tree()
      const machinen = yield* Machinen
      const vm = yield* boot({ liveMounts: [{ host, guest: "/mnt/work" }] })
      const refused = (what: string) =>
        Effect.gen(function* () {
          const dir = fresh()
          const error = yield* Effect.flip(Effect.asVoid(machinen.snapshot(vm, { outDir: dir, leaveRunning: true })))
          assert.strictEqual(error.code, "SNAPSHOT_MOUNT_BUSY", error.message)
          assert.include(error.message, what)
          assert.isFalse(existsSync(dir))
        })
      const holders: ReadonlyArray<readonly [script: string, what: string]> = [
        ["exec sleep 1000 </mnt/work/src/main.c", "(sleep) /mnt/work/src/main.c"],
        ["cd /mnt/work/src; exec sleep 1000", "(sleep) /mnt/work/src"],
        ["cp /bin/busybox /mnt/work/sleep; exec /mnt/work/sleep 1000", "(sleep) /mnt/work/sleep"],
        ["exec unshare -m sh -c 'exec sleep 1000'", "(its own mount)"]
      ]
      for (const [script, what] of holders) {
        const running = yield* vm.start(script)
        yield* sh(vm, `until [ "$(cat /proc/${running.pid}/comm)" = sleep ]; do sleep 0.02; done`)
        yield* refused(what)
        yield* running.signal(9)
        yield* sh(vm, `while kill -0 ${running.pid} 2>/dev/null; do :; done`)
      }
      yield* machinen.snapshot(vm, { outDir: fresh(), leaveRunning: true })

      // asked for: the source keeps all, a copy's processes get EIO, and the share comes when they let go
      yield* sh(
        vm,
        "sh -c 'exec 3<>/mnt/work/held; while sleep 0.05; do echo x >&3 2>/dev/null && echo yes >/tmp/state || echo no >/tmp/state; done' >/dev/null 2>&1 & echo $! >/tmp/holder"
      )
      const dir = fresh()
      yield* machinen.snapshot(vm, { outDir: dir, leaveRunning: true, lazyUmount: true })
      yield* sh(
        vm,
        'rm /tmp/state; until [ "$(cat /tmp/state 2>/dev/null)" = yes ]; do sleep 0.05; done; cat /mnt/work/tool'
      )
      const { rejuvenation, vm: copy } = yield* machinen.restore({ snapDir: dir })
      assert.include(
        rejuvenation.kept.map((kept) => kept.what),
        "shares"
      )
      yield* sh(copy, 'rm -f /tmp/state; until [ "$(cat /tmp/state 2>/dev/null)" = no ]; do sleep 0.05; done')
      assert.strictEqual(yield* sh(copy, "ls /mnt/work"), "")
      yield* sh(copy, "kill -9 $(cat /tmp/holder); until [ -e /mnt/work/tool ]; do sleep 0.05; done; /mnt/work/tool")
    }).pipe(Effect.provide(machine))
  )
})
