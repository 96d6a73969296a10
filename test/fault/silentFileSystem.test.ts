import * as fs from "node:fs"
import { afterAll, assert, it, layer } from "@effect/vitest"
import { Effect, Fiber, Queue, Stream } from "effect"
import type { ExecError } from "../../src/errors.ts"
import { Machinen } from "../../src/Machinen.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { Guest, guest, live, settled, sh, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))

const server = fs.readFileSync(new URL("../silentFuse.py", import.meta.url), "utf8")
let mounted = 0

/** Mounts a file system whose server stops answering at the first of these operations, for as long as the scope lasts. */
const silentFrom = Effect.fnUntraced(function* (vm: Vm, operation: "lookup" | "open" | "read") {
  const at = `/mnt/silent-${mounted++}`
  const fifo = `/run${at.replaceAll("/", "-")}`
  // the last to go: without its server the file system fails whatever still waits
  yield* Effect.addFinalizer(() => Effect.ignore(sh(vm, `umount --lazy ${at}`)))
  const running = yield* vm.start({ argv: ["python3", "-c", server, at, operation, fifo] })
  yield* Stream.runHead(running.output)
  return {
    at,
    /** Completes once the operation has come, and is not being answered. */
    silent: sh(vm, `cat ${fifo}.at`),
    speak: sh(vm, `echo >${fifo}.on`)
  }
})

/** What has nothing to do with that file system. */
const othersGoOn = Effect.fnUntraced(function* (vm: Vm) {
  assert.strictEqual(yield* sh(vm, "echo fine"), "fine")
  const { output, signal } = yield* vm.start({ argv: ["sleep", "1001"] })
  const ended = yield* Effect.fork(Stream.runDrain(output))
  yield* signal(15)
  yield* Fiber.join(ended)
  yield* vm.writeFile("/run/other", "other")
  assert.strictEqual(text(yield* Stream.runHead(vm.readFile("/run/other")).pipe(Effect.flatten)), "other")
  assert.isAbove((yield* vm.stats).uptimeMs, 0)
  yield* Effect.scoped(vm.freeze({ sync: false, lazyUmount: true, timeout: "5 seconds" }))
})

/** Descriptors of the agent, and its children that have ended and are not reaped. */
const descriptorsAndZombies = "ls /proc/$PPID/fd | wc -l; ps --ppid $PPID -o stat= | grep -c Z || true"
const held = (vm: Vm) => sh(vm, descriptorsAndZombies)

/** Children of the agent that have not become their programs. */
const starting =
  'for pid in $(pgrep -P $PPID); do readlink /proc/$pid/exe; done | grep -c -F -x "$(readlink /proc/$PPID/exe)" || true'

/** The guest has no event for the end of what a thread of the agent still does. */
const untilPrints = (vm: Vm, script: string, wanted: string) =>
  Effect.repeat(sh(vm, script), { until: (now) => now === wanted }).pipe(Effect.timeout("20 seconds"))

type Attempt = (vm: Vm, at: string) => Effect.Effect<unknown, unknown>
const attempts: ReadonlyArray<readonly [what: string, attempt: Attempt]> = [
  ["the program of a command", (vm, at) => vm.execRaw({ argv: [`${at}/program`] })],
  ["a directory of a command's PATH", (vm, at) => vm.execRaw({ argv: ["program"], env: { PATH: at } })],
  ["the working directory of a command", (vm, at) => vm.execRaw({ argv: ["true"], cwd: `${at}/program` })],
  [
    "the program of a session",
    (vm, at) =>
      Effect.scoped(
        Effect.zipRight(
          vm.terminal({ argv: [`${at}/program`] }, { columns: 80, rows: 24, session: "held" }),
          Effect.never
        )
      )
  ],
  ["a file that is read", (vm, at) => Stream.runDrain(vm.readFile(`${at}/program`))],
  ["a file that is written", (vm, at) => vm.writeFile(`${at}/program`, "text")],
  ["what is described", (vm, at) => vm.stat(`${at}/program`)],
  ["a directory that is listed", (vm, at) => vm.list(`${at}/program`)],
  ["a tree that is pulled", (vm, at) => vm.pull(`${at}/program`, `${home}/pulled`)],
  ["a tree that is pushed", (vm, at) => vm.push(import.meta.dirname, `${at}/program`)],
  ["a directory that is watched", (vm, at) => Effect.scoped(vm.watch(`${at}/program`))],
  ["a socket of a tunnel", (vm, at) => Effect.scoped(vm.connect({ path: `${at}/program` }))]
]

layer(guest(home, { image: "debian" }), { excludeTestServices: true, timeout: 60_000 })(
  "a file system that does not answer",
  (it) => {
    for (const [what, attempt] of attempts) {
      it.scoped(`delays no other operation with ${what}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const before = yield* held(vm)
          yield* Effect.scoped(
            Effect.gen(function* () {
              const { at, silent, speak } = yield* silentFrom(vm, "lookup")
              const trying = yield* Effect.fork(attempt(vm, at))
              yield* silent
              yield* Effect.timeout(othersGoOn(vm), "20 seconds")
              yield* Effect.timeout(Fiber.interrupt(trying), "5 seconds")
              yield* Effect.timeout(othersGoOn(vm), "20 seconds")
              yield* speak
            })
          )
          yield* untilPrints(vm, descriptorsAndZombies, before)
        })
      )
    }

    it.scoped("lets go of a command whose caller has gone before it was started", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const before = yield* held(vm)
        yield* Effect.scoped(
          Effect.gen(function* () {
            const { at, silent, speak } = yield* silentFrom(vm, "open")
            const trying = yield* Effect.fork(vm.execRaw({ argv: [`${at}/program`] }))
            yield* silent
            yield* Effect.timeout(Fiber.interrupt(trying), "5 seconds")
            assert.strictEqual(yield* sh(vm, starting), "1")
            yield* speak
            yield* untilPrints(vm, starting, "0")
            assert.strictEqual(yield* sh(vm, "pgrep -f '^sleep 1000$' || true"), "")
          })
        )
        yield* untilPrints(vm, descriptorsAndZombies, before)
      })
    )

    it.scoped("does not take a name twice for a session that is being started", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const { at, silent, speak } = yield* silentFrom(vm, "lookup")
        const options = { columns: 80, rows: 24, session: "one" }
        const first = yield* Effect.fork(vm.terminal({ argv: [`${at}/program`] }, options))
        yield* silent
        const second = yield* Effect.fork(Effect.flip(vm.terminal({ argv: ["sh"] }, options)))
        const other = yield* vm.terminal({ argv: ["sh"] }, { ...options, session: "other" })
        yield* speak
        const { pid } = yield* Fiber.join(first)
        assert.strictEqual((yield* Fiber.join(second)).code, "EXEC_SESSION_IN_USE")
        assert.sameMembers(
          (yield* vm.sessions).map((session) => session.pid),
          [pid, other.pid]
        )
        yield* vm.killSession("one")
        yield* vm.killSession("other")
      })
    )
  }
)

it.scopedLive("floods of commands that wait for a file system, and of watches, leave the rest its threads", () =>
  Effect.gen(function* () {
    const { vm } = yield* (yield* Machinen).boot({ image: "debian" })
    yield* sh(vm, "echo 1024 >/proc/sys/fs/inotify/max_user_instances")
    const { at } = yield* silentFrom(vm, "lookup")
    const command = vm.execRaw({ argv: [`${at}/program`] })
    const errors = yield* Queue.unbounded<ExecError>()
    const attempt = Effect.flatMap(Effect.flip(command), (error) => errors.offer(error))
    const flood = Effect.replicateEffect(attempt, 100, { concurrency: "unbounded", discard: true })
    const trying = yield* Effect.fork(flood)
    const refused = yield* Effect.timeout(errors.take, "20 seconds")
    assert.strictEqual(refused.code, "EXEC_GUEST_BUSY")
    assert.match(refused.message, /no thread is free for commands that are being started/)
    assert.strictEqual((yield* Effect.flip(vm.execRaw("true"))).message, refused.message)
    // their callers go, and leave their threads; each watch has one, too
    yield* Fiber.interrupt(trying)
    const watches = Effect.replicateEffect(vm.watch("/run"), 500, { concurrency: 16, discard: true })
    yield* Effect.timeout(watches, "30 seconds")
    yield* vm.writeFile("/run/other", "other")
    assert.isAbove((yield* vm.stats).uptimeMs, 0)
    yield* Effect.scoped(vm.freeze({ sync: true, lazyUmount: true, timeout: "5 seconds" }))
    assert.isTrue((yield* vm.stop()).orderly)
  }).pipe(Effect.provide(live(home)))
)
