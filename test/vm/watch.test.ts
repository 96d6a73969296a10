import { existsSync } from "node:fs"
import * as path from "node:path"
import { afterAll, assert, describe, it, layer } from "@effect/vitest"
import { Chunk, Effect, Fiber, Stream } from "effect"
import type { FileChange } from "../../src/guest/AgentProtocol.ts"
import { Machinen } from "../../src/Machinen.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { Guest, guest, live, settled, sh, startCli, temporaryDirectory, temporaryHome } from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))

/** A watch that stands; `until` gives what is told up to and with the first change that is wanted. */
const watching = Effect.fnUntraced(function* (vm: Vm, dir: string, recursive = true) {
  const next = yield* Stream.toPull(Stream.rechunk(yield* vm.watch(dir, { recursive }), 1))
  const until = (wanted: (change: FileChange) => boolean) =>
    Effect.gen(function* () {
      const told: Array<FileChange> = []
      for (;;) {
        const changes = yield* next
        told.push(...changes)
        if (Chunk.some(changes, wanted)) return told
      }
    }).pipe(
      Effect.timeout("20 seconds"),
      Effect.mapError((error) => new Error(`it was not told: ${String(error)}`))
    )
  const untilMade = (file: string) =>
    Effect.zipRight(
      vm.writeFile(`${dir}/${file}`, ""),
      until((c) => c.kind === "created" && c.path === file)
    )
  return { until, untilMade }
})

const line = (change: FileChange): string =>
  change.kind === "lost"
    ? "lost"
    : change.kind === "moved"
      ? `moved ${change.from} ${change.path}`
      : `${change.kind} ${change.path}`

/** How many directories are watched in the guest. */
const watched = "cat /proc/[0-9]*/fdinfo/* 2>/dev/null | grep -c ^inotify"
const noneLeft = (vm: Vm) => vm.exec(`until test "$(${watched})" = 0; do sleep 0.01; done`, { timeout: "20 seconds" })
/** Of init and agent, in KiB. */
const resident = (vm: Vm) =>
  Effect.map(
    sh(vm, `cat /proc/[0-9]*/status 2>/dev/null | awk '/^Name/{n=$2} /^VmRSS/&&n=="init"{s+=$2} END{print s}'`),
    Number
  )

layer(guest(home, { memoryMib: 256 }), { excludeTestServices: true, timeout: 60_000 })("a watch", (it) => {
  it.scoped("tells of every kind of change", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* sh(vm, "mkdir -p /srv/kinds/sub")
      const { untilMade } = yield* watching(vm, "/srv/kinds", false)
      yield* sh(
        vm,
        `cd /srv/kinds; echo 1 >file; chmod 600 file; mv file name; mkdir dir; rmdir dir; echo 1 >sub/unseen
         mv name /srv/out; mv /srv/out in; ln -s nowhere link; rm in link`
      )
      assert.deepStrictEqual((yield* untilMade("end")).map(line), [
        "created file",
        "modified file",
        "modified file",
        "moved file name",
        "created dir",
        "removed dir",
        "removed name",
        "created in",
        "created link",
        "removed in",
        "removed link",
        "created end"
      ])
    })
  )

  it.scoped("sees what the image brought change, below it and by another name", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const { untilMade } = yield* watching(vm, "/etc")
      yield* sh(vm, `echo more >>/etc/hosts; rm /etc/group; mkdir /etc/a /etc/a/b; mv /etc/a "/etc/ä \n"`)
      const first = (yield* untilMade("ä \n/b/1")).map(line)
      for (const change of ["modified hosts", "removed group", "created a", "moved a ä \n", "created ä \n/b/1"])
        assert.include(first, change)
      yield* sh(vm, `rm -r "/etc/ä \n"`)
      assert.include((yield* untilMade("end")).map(line), "removed ä \n")
    })
  )

  it.scoped("misses nothing from the moment it stands", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* vm.makeDirectory("/srv/soon/below")
      for (let n = 0; n < 25; n++) {
        yield* Effect.scoped(
          Effect.gen(function* () {
            const { untilMade } = yield* watching(vm, "/srv/soon")
            assert.deepStrictEqual(line((yield* untilMade(`below/${n}`))[0] ?? { kind: "lost" }), `created below/${n}`)
          })
        )
      }
      yield* noneLeft(vm)
    })
  )

  it.scoped("finds all that is made in new directories, however fast", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* vm.makeDirectory("/srv/fast")
      const { untilMade } = yield* watching(vm, "/srv/fast")
      yield* sh(vm, "cd /srv/fast; for n in $(seq 300); do mkdir -p $n/b/c; : >$n/1; : >$n/b/2; : >$n/b/c/3; done")
      const told = new Set((yield* untilMade("end")).map(line))
      const found = yield* sh(vm, "cd /srv/fast; find * | sort")
      assert.lengthOf(found.split("\n"), 300 * 6 + 1)
      const missed = found.split("\n").filter((file) => !told.has(`created ${file}`))
      assert.deepStrictEqual(missed, [])
      assert.isFalse(told.has("lost"))
    })
  )

  it.scoped("that is not read costs the guest no memory, and reports that it lost changes", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const queue = "/proc/sys/fs/inotify/max_queued_events"
      const before = yield* sh(vm, `mkdir /srv/flood; cat ${queue}; echo 100 >${queue}`)
      const { until } = yield* watching(vm, "/srv/flood")
      const flood = (n: number) =>
        sh(
          vm,
          `mkdir /srv/flood/${n}; cd /srv/flood/${n}; for i in 1 2 3; do seq 10000 | sed s/^/a-long-name-/ | xargs touch; done`
        )
      yield* flood(1)
      const filled = yield* resident(vm)
      assert.isAbove(filled, 0)
      yield* flood(2)
      assert.isBelow((yield* resident(vm)) - filled, 1024)
      let last: FileChange | undefined
      let tries = 0
      do {
        // Made in a directory whose own creation was lost. This one is as well, as long as there is more than has been read.
        const file = `2/after-${++tries}`
        yield* vm.writeFile(`/srv/flood/${file}`, "")
        last = (yield* until((change) => change.kind === "lost" || change.path === file)).at(-1)
      } while (last?.kind === "lost")
      assert.isAbove(tries, 1)
      yield* sh(vm, `echo ${before} >${queue}`)
    })
  )

  for (const [what, script] of [
    ["removed", "rm -r /srv/ending"],
    ["renamed", "mv /srv/ending /srv/ended"]
  ] as const) {
    it.scoped(`ends in order when its directory is ${what}`, () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.makeDirectory("/srv/ending/below")
        const changes = yield* vm.watch("/srv/ending", { recursive: true })
        yield* sh(vm, script)
        yield* Effect.timeout(Stream.runDrain(changes), "20 seconds")
        yield* noneLeft(vm)
      })
    )
  }

  it.scoped("does not hold a filesystem, ends with it, and does not look into others", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* sh(vm, "mkdir -p /srv/other/fs; mount -t tmpfs none /srv/other/fs; mkdir /srv/other/fs/dir")
      const around = yield* watching(vm, "/srv/other")
      const changes = yield* vm.watch("/srv/other/fs", { recursive: true })
      yield* sh(vm, "touch /srv/other/fs/dir/file; umount /srv/other/fs")
      const told = yield* Effect.timeout(Stream.runCollect(changes), "20 seconds")
      assert.include([...told].map(line), "created dir/file")
      assert.deepStrictEqual((yield* around.untilMade("end")).map(line), ["created end"])
    })
  )

  it.effect("of what cannot be watched fails with a code", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      for (const [dir, code] of [
        ["/srv/none", "FILES_NOT_FOUND"],
        ["/etc/passwd", "FILES_GUEST_IO"],
        ["srv", "FILES_PATH_INVALID"],
        ["/srv\0", "FILES_PATH_INVALID"]
      ] as const) {
        assert.strictEqual((yield* Effect.flip(Effect.asVoid(Effect.scoped(vm.watch(dir))))).code, code)
      }
    })
  )

  it.scoped("of more directories than the guest watches fails with a code, at once or when it comes to that", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const limit = "/proc/sys/fs/inotify/max_user_watches"
      const before = yield* sh(vm, `mkdir -p /srv/many/1/2/3; cat ${limit}; echo 5 >${limit}`)
      const changes = yield* vm.watch("/srv/many", { recursive: true })
      yield* sh(vm, "mkdir -p /srv/many/a/b")
      const late = yield* Effect.flip(Effect.timeout(Stream.runDrain(changes), "20 seconds"))
      const early = yield* Effect.flip(Effect.asVoid(Effect.scoped(vm.watch("/srv/many", { recursive: true }))))
      yield* sh(vm, `echo ${before} >${limit}`)
      for (const error of [late, early]) {
        assert.strictEqual(error._tag === "FilesError" && error.code, "FILES_WATCH_LIMIT")
        assert.include(error.message, "max_user_watches")
      }
    })
  )

  it.scoped("is gone from the guest with its scope", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* noneLeft(vm)
      yield* Effect.scoped(
        Effect.gen(function* () {
          yield* vm.watch("/srv", { recursive: true })
          yield* vm.watch("/etc")
          assert.isAbove(Number(yield* sh(vm, watched)), 1)
        })
      )
      yield* noneLeft(vm)
    })
  )

  it.scoped("is shown by the CLI, as lines or JSON, until it is interrupted or over", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* sh(vm, "mkdir -p /srv/shown/sub")
      const ended = yield* startCli(home, ["watch", "--recursive", vm.id, "/srv/shown"])
      const interrupted = yield* startCli(home, ["watch", vm.id, "/srv/shown", "--json"])
      yield* ended.printed("watching")
      yield* interrupted.printed("watching")
      yield* sh(vm, `cd /srv/shown; mkdir "$(printf 'a\\033[31m')"; mv a* b; mkdir b/c; rmdir sub`)
      yield* interrupted.printed(`{"kind":"removed","path":"sub"}\n`)
      yield* interrupted.kill("SIGINT")
      const json = yield* interrupted.result
      assert.strictEqual(json.code, 130)
      assert.deepStrictEqual(JSON.parse(json.stdout.split("\n")[1] ?? ""), {
        kind: "moved",
        from: "a\u001b[31m",
        path: "b"
      })
      yield* sh(vm, "rm -r /srv/shown")
      const { code, stdout } = yield* ended.result
      assert.strictEqual(code, 0)
      assert.include(stdout, `created a\\e[31m\nmoved a\\e[31m -> b\ncreated b/c\nremoved sub\n`)
    })
  )
})

describe("a VM with a watch", () => {
  for (const engine of ["vmstate", "criu"] as const) {
    it.scopedLive(
      `is copied by ${engine}: the source's goes on, the copy has none`,
      () =>
        Effect.gen(function* () {
          const machinen = yield* Machinen
          const host = temporaryDirectory()
          const { vm } = yield* machinen.boot({
            image: engine === "criu" ? "debian" : "micro",
            liveMounts: [{ host, guest: "/mnt/live" }]
          })
          yield* vm.makeDirectory("/srv/kept/below")
          const shared = yield* watching(vm, "/mnt/live")
          const { untilMade } = yield* watching(vm, "/srv/kept")
          yield* untilMade("below/before")
          const outDir = path.join(home, engine)
          yield* machinen.snapshot(vm, { outDir, engine, leaveRunning: true })
          const { vm: copy } = yield* machinen.restore({ snapDir: outDir })
          yield* noneLeft(copy)
          yield* copy.writeFile("/srv/kept/below/elsewhere", "")
          assert.notInclude((yield* untilMade("below/after")).map(line), "created below/elsewhere")
          const own = yield* watching(copy, "/srv/kept")
          yield* own.untilMade("below/own")
          yield* shared.untilMade("file")
          assert.isTrue(existsSync(path.join(host, "file")))
        }).pipe(Effect.provide(live(home))),
      90_000
    )
  }

  it.scopedLive("that ends fails the watch", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { vm } = yield* machinen.boot({ image: "micro" })
      const ending = yield* Effect.fork(Effect.flip(Stream.runDrain(yield* vm.watch("/srv"))))
      yield* vm.stop()
      assert.strictEqual((yield* Fiber.join(ending)).code, "FILES_AGENT_UNAVAILABLE")
    }).pipe(Effect.provide(live(home)))
  )
})
