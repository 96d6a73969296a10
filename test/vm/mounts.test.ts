import { execFileSync, spawn } from "node:child_process"
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import * as facade from "../../src/promise.ts"
import type { ForkOptions } from "../../src/snapshot/fork.ts"
import type { RestoreOptions } from "../../src/snapshot/restore.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  boot,
  cli,
  environment,
  live,
  newBundle,
  settled,
  sh,
  temporaryDirectory,
  temporaryHome,
  text
} from "../fixtures.ts"

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
      const first = newBundle()
      const { bundle } = yield* machinen.snapshot(vm, { outDir: first, leaveRunning: true })
      assert.deepStrictEqual(bundle.manifest.mount, { guest: "/mnt/work", host })
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
      const second = newBundle()
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
      // devices are the host's own
      assert.include(yield* sh(vm, "cd /mnt/rw; mknod x c 1 3 2>&1; mknod x b 8 0 2>&1; true"), "x: ")
      assert.isFalse(existsSync(path.join(rw, "x")))

      // a file that is open and one that is not
      const reader = yield* vm.start({
        // not cat, which uses sendfile(2): that does not ask how long a file is by now (filemap_splice_read, mm/filemap.c)
        argv: [
          "sh",
          "-c",
          "exec 3</mnt/rw/made; head -c 9 <&3; until test -e /tmp/go; do sleep 0.05; done; head -c 9 <&3"
        ]
      })
      const append = yield* Effect.once(
        Effect.suspend(() => {
          appendFileSync(path.join(rw, "made"), "host\n")
          // an operation begins once the guest knows what the host has changed before
          return sh(vm, "touch /tmp/go")
        })
      )
      const read = yield* reader.output.pipe(
        Stream.tap(() => append),
        Stream.map(({ bytes }) => text(bytes)),
        Stream.mkString
      )
      assert.strictEqual(read, "guest\nhost\n")
      writeFileSync(path.join(rw, "made"), "host\nmore\n")
      writeFileSync(path.join(ro, "new"), "from the host")
      assert.strictEqual(yield* sh(vm, "cat /mnt/deep/ro/new /mnt/rw/made"), "from the hosthost\nmore")
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
      mkdirSync(path.join(host, "empty"))
      const before = look(host)
      const vm = yield* boot({ liveMounts: [{ host, guest: "/mnt/ro", mode: "ro" }] })
      yield* sh(vm, "mount -o remount,rw /mnt/ro 2>/dev/null; true")
      const changes = [
        "echo x >>src/main.c",
        ": >src/main.c",
        ": >new",
        "mkdir new",
        "rm tool",
        "rmdir empty",
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
        "mv src empty/"
      ]
      const refused = changes.map((change) => `(${change}) >/dev/null 2>&1 && echo '${change}'; true`)
      assert.strictEqual(yield* sh(vm, ["cd /mnt/ro", ...refused].join("\n")), "")
      // each can be done to a tree like this
      const done = changes.map(
        (change) => `rm -rf /tmp/rw; cp -a /mnt/ro /tmp/rw; cd /tmp/rw; (${change}) >/dev/null 2>&1 || echo '${change}'`
      )
      assert.strictEqual(yield* sh(vm, done.join("\n")), "")
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
        "(while :; do sleep 0.01; done) >/dev/null 2>&1 & cat /mnt/one/src/main.c >/dev/null; grep /mnt/ /proc/self/mountinfo >/tmp/before"
      )
      const dir = newBundle()
      const { bundle } = yield* machinen.snapshot(vm, { outDir: dir, leaveRunning: true })
      assert.deepStrictEqual(bundle.manifest.liveMounts, vm.entry.liveMounts)
      // never gone: the same mount
      assert.strictEqual(
        yield* sh(
          vm,
          "grep /mnt/ /proc/self/mountinfo | diff - /tmp/before; echo still >/mnt/one/still; cat /mnt/one/still"
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

  it.scopedLive("in use stays in use in a copy: open files, working directories, programs, namespaces", () =>
    Effect.gen(function* () {
      const [host, other] = [tree(), tree()]
      const machinen = yield* Machinen
      const vm = yield* boot({ liveMounts: [{ host, guest: "/mnt/work" }] })
      // each writes by a way of its own, and says how that went
      const says = (name: string, act: string) =>
        `while sleep 0.02; do ${act} 2>/dev/null && echo yes >/tmp/${name} || echo no >/tmp/${name}; done`
      const holders: ReadonlyArray<readonly [name: string, script: string]> = [
        ["file", `exec 3>>/mnt/work/held; ${says("file", "echo x >&3")}`],
        ["directory", `cd /mnt/work/src; ${says("directory", "cat main.c >/dev/null")}`],
        ["namespace", `exec unshare -m sh -c '${says("namespace", "cat /mnt/work/src/main.c >/dev/null")}'`],
        [
          "program",
          `cp /bin/busybox /mnt/work/sh; exec /mnt/work/sh -c '${says("program", "/mnt/work/tool >/dev/null")}'`
        ]
      ]
      for (const [, script] of holders) yield* vm.start(script)
      const all = (copy: Vm) =>
        sh(
          copy,
          `${holders.map(([name]) => `rm -f /tmp/${name}; until [ -s /tmp/${name} ]; do sleep 0.02; done; cat /tmp/${name}`).join("; ")}`
        )
      const yes = holders.map(() => "yes").join("\n")
      assert.strictEqual(yield* all(vm), yes)
      const dir = newBundle()
      yield* machinen.snapshot(vm, { outDir: dir, leaveRunning: true })
      assert.strictEqual(yield* all(vm), yes)
      const { vm: copy } = yield* machinen.restore({ snapDir: dir })
      assert.strictEqual(yield* all(copy), yes)
      const [sibling] = yield* fork(copy)
      assert.strictEqual(sibling === undefined ? "" : yield* all(sibling.vm), yes)

      // a file that is another by then is lost for who had it open, and for nobody else
      yield* Effect.all([vm.stop(), copy.stop()])
      renameSync(path.join(host, "held"), path.join(host, "old"))
      rmSync(path.join(host, "old"))
      writeFileSync(path.join(host, "held"), "another")
      const { lost, vm: later } = yield* machinen.restore({ snapDir: dir })
      assert.deepStrictEqual(lost, [{ path: "/mnt/work/held", why: "another file has its name" }])
      const states = (yield* all(later)).split("\n")
      assert.strictEqual(states[0], "no")
      assert.deepStrictEqual(states.slice(1), ["yes", "yes", "yes"])
      assert.strictEqual(yield* sh(later, "cat /mnt/work/held"), "another")
      yield* later.stop()

      // with another directory only what is not there is lost
      const { vm: elsewhere } = yield* machinen.restore({
        snapDir: dir,
        liveMounts: [{ host: other, guest: "/mnt/work" }]
      })
      assert.strictEqual(yield* sh(elsewhere, "cat /mnt/work/src/main.c; ls /mnt/work"), "int main;\nsrc\ntool")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("with locks is not copied unless that was asked for: two machines would hold them", () =>
    Effect.gen(function* () {
      const host = tree()
      const machinen = yield* Machinen
      const vm = yield* boot({ image: "debian", liveMounts: [{ host, guest: "/work" }] })
      const locks: ReadonlyArray<readonly [how: string, program: string]> = [
        ["flock", "fcntl.flock(f, fcntl.LOCK_EX)"],
        ["POSIX", "fcntl.lockf(f, fcntl.LOCK_EX)"]
      ]
      for (const [how, lock] of locks) {
        const hold = `import fcntl, time; f = open("/work/tool", "r+"); ${lock}; open("/work/held", "w"); time.sleep(1000)`
        const holder = yield* vm.start({ argv: ["python3", "-c", hold] })
        yield* sh(vm, "until [ -e /work/held ]; do sleep 0.02; done; rm /work/held")
        const dir = newBundle()
        const error = yield* Effect.flip(Effect.asVoid(machinen.snapshot(vm, { outDir: dir, leaveRunning: true })))
        assert.strictEqual(error.code, "SNAPSHOT_MOUNT_BUSY", how)
        assert.include(error.message, `${holder.pid} (python3) /work/tool`)
        assert.isFalse(existsSync(dir))
        yield* machinen.snapshot(vm, { outDir: dir, leaveRunning: true, lazyUmount: true })
        const { vm: copy } = yield* machinen.restore({ snapDir: dir })
        assert.strictEqual(yield* sh(copy, "cat /work/src/main.c"), "int main;")
        yield* copy.stop()
        yield* holder.signal(9)
        yield* sh(vm, `while kill -0 ${holder.pid} 2>/dev/null; do sleep 0.02; done`)
      }
      yield* machinen.snapshot(vm, { outDir: newBundle(), leaveRunning: true })
    }).pipe(Effect.provide(machine))
  )
})

/**
 * What a guest's root tries: for some seconds `d` is by turns a directory and a link that leads out of the share, by every way to swap them,
 * while every kind of operation is done through `d`. Prints what it got to see of files that are not in the share.
 */
const attack = `
import os, stat, sys, threading, time
root, seconds = sys.argv[1], float(sys.argv[2])
os.chdir(root)
targets = ["../outside", "../../../../../../../../..%s" % os.environ["OUTSIDE"], os.environ["OUTSIDE"], "..", "."]
end = time.time() + seconds
os.makedirs("real", exist_ok=True)
open("real/secret", "w").write("mine")
for i, target in enumerate(targets):
    os.symlink(target, "link%d" % i)
found = set()
def swap():
    n = 0
    while time.time() < end:
        n += 1
        for act in (lambda: os.rename("real", "d"), lambda: os.rename("d", "real"),
                    lambda: os.rename("link%d" % (n % len(targets)), "d"), lambda: os.rename("d", "link%d" % (n % len(targets)))):
            try: act()
            except OSError: pass
def operate():
    n = 0
    while time.time() < end:
        n += 1
        for path in ("d", "d/outside", "d/deep"):
            for act in (
                lambda: found.add(open(path + "/secret").read()),
                lambda: found.update(os.listdir(path)),
                lambda: open(path + "/victim", "w").write("owned"),
                lambda: open(path + "/planted%d" % (n % 7), "w").write("x"),
                lambda: os.mkdir(path + "/plantedir"),
                lambda: os.symlink("x", path + "/plantedlink"),
                lambda: os.link(path + "/secret", "stolen"),
                lambda: os.link("link0", path + "/planted"),
                lambda: os.rename(path + "/secret", "stolen"),
                lambda: os.rename("mine%d" % n, path + "/planted"),
                lambda: os.unlink(path + "/victim"),
                lambda: os.rmdir(path + "/empty"),
                lambda: os.chmod(path + "/victim", 0o777),
                lambda: os.chown(path + "/victim", 1, 1),
                lambda: os.truncate(path + "/victim", 0),
                lambda: os.utime(path + "/victim", (1, 1)),
                lambda: os.setxattr(path + "/victim", "user.x", b"1"),
                lambda: os.mknod(path + "/planteddev", stat.S_IFCHR | 0o666, os.makedev(1, 5)),
            ):
                try: act()
                except OSError: pass
threads = [threading.Thread(target=f) for f in (swap, operate, operate)]
for t in threads: t.start()
for t in threads: t.join()
for root, dirs, files in os.walk("."):
    for name in files:
        try: found.add(open(os.path.join(root, name)).read(100))
        except OSError: pass
print("\\n".join(sorted(found)))
`

describe.sequential("a share's root", () => {
  afterEach(() => settled(home))

  // Slow (20 s): the guest and the host swap links for 8 seconds, because a race is only met by many tries.
  it.scopedLive(
    "is never left: links swapped in a race, dots, hard links, renames, nodes, the port itself",
    () =>
      Effect.gen(function* () {
        const parent = temporaryDirectory()
        const [share, ro, outside] = [path.join(parent, "share"), path.join(parent, "ro"), path.join(parent, "outside")]
        for (const dir of [share, ro, outside, path.join(outside, "empty"), path.join(share, "deep")]) mkdirSync(dir)
        writeFileSync(path.join(outside, "secret"), "host secret")
        writeFileSync(path.join(outside, "victim"), "intact")
        writeFileSync(path.join(ro, "kept"), "intact")
        // links of the host's own, of which a guest could make better use than of its own
        symlinkSync(outside, path.join(share, "absolute"))
        symlinkSync("../outside", path.join(share, "relative"))
        symlinkSync("../outside/victim", path.join(share, "to-a-file"))
        const outsideBefore = look(outside)
        const roBefore = look(ro)
        const besides = readdirSync(parent).sort()

        const vm = yield* boot({
          image: "debian",
          liveMounts: [
            { host: share, guest: "/mnt/share" },
            { host: ro, guest: "/mnt/ro", mode: "ro" }
          ]
        })
        // what the guest has at these places is its own
        yield* sh(
          vm,
          "cat /mnt/share/absolute/secret /mnt/share/relative/secret /mnt/share/to-a-file 2>/dev/null && exit 1; true"
        )
        assert.include(yield* sh(vm, "ls -a /mnt/share/.."), "ro\nshare")
        yield* sh(
          vm,
          "(echo x >/mnt/share/to-a-file) 2>/dev/null; (echo x >/mnt/share/absolute/planted) 2>/dev/null; true"
        )
        // from one share into the other
        yield* sh(
          vm,
          "cd /mnt/share; ln /mnt/ro/kept stolen 2>/dev/null && exit 1; mv /mnt/ro/kept . 2>/dev/null; echo x >y; mv y /mnt/ro/ 2>/dev/null; true"
        )

        // a swapper on the host's side as well
        const swapper = spawn(
          "sh",
          [
            "-c",
            "mkdir -p h; ln -s ../outside l; while :; do mv -T h e; mv -T l e2; mv -T e2 d; mv -T d l; mv -T e d; mv -T d h; done 2>/dev/null"
          ],
          { cwd: share, stdio: "ignore" }
        )
        yield* Effect.addFinalizer(() => Effect.sync(() => swapper.kill("SIGKILL")))
        yield* vm.writeFile("/tmp/attack.py", attack)
        const seen = yield* sh(vm, `OUTSIDE=${outside} python3 /tmp/attack.py /mnt/share 8 2>&1`)
        swapper.kill("SIGKILL")
        assert.include(seen, "mine")
        assert.notInclude(seen, "host secret")

        // the port is the agent's, and what it has unmounted stays so
        const port = yield* sh(vm, "grep -l machinen.share /sys/class/virtio-ports/*/name | cut -d/ -f5")
        const taken = yield* vm.execRaw(`exec 3<>/dev/${port}`)
        assert.notStrictEqual(taken.exitCode, 0)
        assert.include(text(taken.stderr), "busy")
        yield* sh(vm, "umount /mnt/ro; ls /mnt/ro; test ! -e /mnt/ro/kept; ls /mnt/share >/dev/null")

        assert.strictEqual(look(outside), outsideBefore)
        assert.strictEqual(look(ro), roBefore)
        assert.deepStrictEqual(readdirSync(parent).sort(), besides)
        const nodes = execFileSync("find", [share, "(", "-type", "c", "-o", "-type", "b", ")"], { encoding: "utf8" })
        assert.strictEqual(nodes, "")
      }).pipe(Effect.provide(machine)),
    90_000
  )

  it.scoped("may vanish on the host: the guest gets errors, and goes on", () =>
    Effect.gen(function* () {
      const [gone, moved] = [tree(), tree()]
      const vm = yield* boot({
        liveMounts: [
          { host: gone, guest: "/mnt/gone" },
          { host: moved, guest: "/mnt/moved" }
        ]
      })
      rmSync(gone, { recursive: true })
      renameSync(moved, `${moved}-away`)
      const { exitCode, stderr } = yield* vm.execRaw("ls /mnt/gone; mkdir /mnt/gone/x")
      assert.notStrictEqual(exitCode, 0)
      assert.include(Buffer.from(stderr).toString(), "No such file or directory")
      assert.strictEqual(
        yield* sh(vm, "cat /mnt/moved/src/main.c; echo new >/mnt/moved/new; echo alive"),
        "int main;\nalive"
      )
      assert.isTrue(existsSync(path.join(`${moved}-away`, "new")))
      assert.isFalse(existsSync(gone) || existsSync(moved))
    }).pipe(Effect.provide(machine))
  )

  it.scoped("is one of ten, which fit one machine with a copy and a network card", () =>
    Effect.gen(function* () {
      const hosts = Array.from({ length: 10 }, tree)
      const vm = yield* boot({
        network: "nat",
        mount: { host: tree(), guest: "/mnt/copy" },
        liveMounts: hosts.map((host, i) => ({ host, guest: `/mnt/live${i}` }))
      })
      assert.strictEqual(
        yield* sh(vm, "cd /mnt; for d in copy live*; do echo $d >$d/name; cat $d/src/main.c; done | wc -l"),
        "11"
      )
      assert.deepStrictEqual(
        hosts.map((host) => readFileSync(path.join(host, "name"), "utf8").trim()),
        hosts.map((_, i) => `live${i}`)
      )
      const machinen = yield* Machinen
      const dir = newBundle()
      yield* machinen.snapshot(vm, { outDir: dir })
      const { vm: copy } = yield* machinen.restore({ snapDir: dir })
      assert.strictEqual(yield* sh(copy, "cat /mnt/copy/name /mnt/live9/name"), "copy\nlive9")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("is there for processes that the engine criu brings back, with the files they had open", () =>
    Effect.gen(function* () {
      const [host, copied] = [tree(), tree()]
      const vm = yield* boot({
        image: "debian",
        mount: { host: copied, guest: "/mnt/copy" },
        liveMounts: [{ host, guest: "/mnt/live" }]
      })
      const script =
        "exec 3>>/mnt/live/out 4>>/mnt/copy/out; cd /mnt/live/src; while :; do echo x >&3; echo y >&4; sleep 0.1; done"
      yield* sh(vm, `setsid sh -c '${script}' </dev/null >/dev/null 2>&1 & sleep 0.5; echo $! >/tmp/pid`)
      const machinen = yield* Machinen
      const dir = newBundle()
      yield* machinen.snapshot(vm, { outDir: dir, engine: "criu" })
      const before = statSync(path.join(host, "out")).size
      const { vm: copy } = yield* machinen.restore({ snapDir: dir })
      const grows = (file: string) =>
        sh(copy, `n=$(wc -c <${file}); until [ $(wc -c <${file}) -gt $n ]; do sleep 0.1; done`)
      yield* grows("/mnt/live/out")
      yield* grows("/mnt/copy/out")
      assert.isAbove(statSync(path.join(host, "out")).size, before)
      assert.isFalse(existsSync(path.join(copied, "out")))
    }).pipe(Effect.provide(machine))
  )
})

describe.sequential("the CLI", () => {
  afterEach(() => settled(home))

  it.live("mounts copies and shares, shows them, and gives copies other ones", () =>
    Effect.gen(function* () {
      const [copied, shared, other] = [tree(), tree(), tree()]
      const run = (...args: ReadonlyArray<string>) => cli(home, args)
      const script = "echo c >/mnt/c/f; cat /mnt/s/src/main.c; touch /mnt/s/x 2>/dev/null || echo refused"
      const once = yield* run(
        ...["run", "--image", "micro", "-v", `${copied}:/mnt/c`, "--mount-live", `${shared}:/mnt/s:ro`],
        ...["--", "sh", "-c", script]
      )
      assert.deepStrictEqual([once.code, once.stdout], [0, "int main;\nrefused\n"], once.stderr)
      assert.isFalse(existsSync(path.join(copied, "f")))

      const up = yield* run(
        "boot",
        "-d",
        "--image",
        "debian",
        "--name",
        "m",
        "-v",
        `${copied}:/mnt/c`,
        "--mount-live",
        `${shared}:/mnt/s`
      )
      assert.strictEqual(up.code, 0, up.stderr)
      const shown = JSON.parse((yield* run("inspect", "m")).stdout)
      assert.deepStrictEqual(
        [shown.mount, shown.liveMounts],
        [{ guest: "/mnt/c", host: copied }, [{ guest: "/mnt/s", host: shared, mode: "rw" }]]
      )
      yield* run("exec", "m", "--", "sh", "-c", "(exec flock /mnt/s/tool sleep 1000 >/dev/null 2>&1 &); sleep 0.3")
      const dir = newBundle()
      const busy = yield* run("snapshot", "m", dir, "--keep-alive")
      assert.strictEqual(busy.code, 1)
      assert.match(busy.stderr, /SNAPSHOT_MOUNT_BUSY.*\d+ \(flock\) \/mnt\/s\/tool[\s\S]*--lazy-umount/)
      assert.strictEqual((yield* run("fork", "m", "-d")).code, 1)
      assert.strictEqual((yield* run("fork", "m", "-d", "--new-name", "f", "--lazy-umount")).code, 0)
      assert.strictEqual((yield* run("snapshot", "m", dir, "--lazy-umount")).code, 0)
      const again = yield* run("restore", dir, "-d", "--name", "r", "--mount-live", `${other}:/mnt/s:ro`)
      assert.strictEqual(again.code, 0, again.stderr)
      assert.deepStrictEqual(JSON.parse((yield* run("inspect", "r")).stdout).liveMounts, [
        { guest: "/mnt/s", host: other, mode: "ro" }
      ])
      for (const name of ["f", "r"]) yield* run("stop", "--force", name)
    })
  )

  const refused: ReadonlyArray<readonly [what: string, args: ReadonlyArray<string>, code: string]> = [
    ["a place outside /mnt", ["-v", "/srv:/srv"], "BOOT_MOUNT_INVALID"],
    ["a place that leads out", ["--mount-live", "/srv:/mnt/../srv"], "BOOT_MOUNT_INVALID"],
    ["two at one place", ["-v", "/srv:/mnt/a", "--mount-live", "/srv:/mnt/a"], "BOOT_MOUNT_INVALID"],
    ["a copy in a share", ["--mount-live", "/srv:/mnt/a", "-v", "/srv:/mnt/a/b"], "BOOT_MOUNT_INVALID"],
    ["a share over the root", ["--mount-live", "/srv:/"], "BOOT_MOUNT_INVALID"],
    ["a share over the guest's devices", ["--mount-live", "/srv:/dev/shm"], "BOOT_MOUNT_INVALID"],
    ["a directory that is not there", ["-v", "/no/such:/mnt/a"], "BOOT_MOUNT_HOST_NOT_FOUND"],
    ["a share that is not there", ["--mount-live", "/no/such:/mnt/a"], "BOOT_MOUNT_HOST_NOT_FOUND"],
    ["a file", ["-v", "/etc/passwd:/mnt/a"], "BOOT_MOUNT_INVALID"],
    ["a device as a share", ["--mount-live", "/dev/null:/mnt/a"], "BOOT_MOUNT_INVALID"],
    [
      "65 shares",
      Array.from({ length: 65 }, (_, i) => ["--mount-live", `/srv:/mnt/${i}`]).flat(),
      "BOOT_MOUNT_INVALID"
    ],
    [
      "a share in a read-only one that has no place for it",
      ["--mount-live", "/srv:/work:ro", "--mount-live", "/srv:/work/no-such-place"],
      "BOOT_GUEST_FAILED"
    ],
    ["two copies", ["-v", "/srv:/mnt/a", "-v", "/srv:/mnt/b"], "PARSE_FLAG_DUPLICATE"],
    ["no place", ["-v", "/srv"], "PARSE_FLAG_MALFORMED"],
    ["an unknown mode", ["--mount-live", "/srv:/mnt/a:rx"], "PARSE_FLAG_MALFORMED"]
  ]
  for (const [what, args, code] of refused) {
    it.live(`refuses ${what}`, () =>
      Effect.gen(function* () {
        const { code: exit, stderr } = yield* cli(home, ["run", "--image", "micro", ...args, "--", "true"])
        assert.notStrictEqual(exit, 0)
        assert.include(stderr, `(${code})`)
        assert.include(stderr, "hint: ")
      })
    )
  }
})

describe.sequential("the Promise API", () => {
  const { boot, list, restore } = facade.make(live(home))
  afterEach(() => settled(home))

  it("mounts, shares, and shows both; its images are those of the library", async () => {
    const [copied, shared, other] = [tree(), tree(), tree()]
    const vm = await boot({
      image: "micro",
      cmd: ["sleep", "infinity"],
      mount: { host: copied, guest: "/mnt/c" },
      mountDiskUpperSizeBytes: 256 * 2 ** 20,
      liveMounts: [{ host: shared, guest: "/mnt/s", mode: "ro" }]
    })
    const { stdout } = await vm.exec(
      "cd /mnt; cat c/src/main.c s/src/main.c; df c | awk 'NR == 2 { print $2 < 262144 }'"
    )
    assert.strictEqual(stdout, "int main;\nint main;\n1\n")
    const [row] = await list()
    assert.deepStrictEqual(row?.liveMounts, [{ guest: "/mnt/s", host: shared, mode: "ro" }])
    assert.strictEqual(row?.mountDisk?.guest, "/mnt/c")
    assert.isTrue(existsSync(row?.mountDisk?.lowerPath ?? "") && existsSync(row?.mountDisk?.upperPath ?? ""))
    const { snapDir } = await vm.snapshot({ outDir: newBundle() })
    const copy = await restore({ snapDir, liveMounts: [{ host: other, guest: "/mnt/s", mode: "rw" }] })
    await copy.exec("echo x >/mnt/s/made")
    await copy.kill()
    assert.isTrue(existsSync(path.join(other, "made")))
  })

  it("makes the disks for other machines", async () => {
    const cacheDir = path.join(temporaryDirectory(), "cache")
    const image = await facade.ensureMountDiskImage(tree(), { cacheDir })
    assert.strictEqual(image.lowerPath, path.join(cacheDir, `${image.key}.sqfs`))
    rmSync(`${image.lowerPath}.ok`)
    facade.markMountDiskImageClean(image.lowerPath)
    assert.isTrue(existsSync(`${image.lowerPath}.ok`))
    const upper = await facade.ensureMountDiskUpper({ sizeBytes: 64 * 2 ** 20 })
    assert.strictEqual(statSync(upper.upperPath).size, upper.sizeBytes)
    rmSync(upper.upperPath)
    assert.match((await facade.resolveMksquashfs()) ?? "", /\/mksquashfs$/)
    assert.match(await facade.mountdiskImgCacheDir(), /\/mountdisk$/)
    const refused = await facade.ensureMountDiskUpper({ sizeBytes: 1 }).catch((error: unknown) => error)
    assert.isTrue(facade.isMachinenError(refused, "BOOT_MOUNT_INVALID"))
  })
})
