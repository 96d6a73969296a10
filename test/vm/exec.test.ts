import { mkdtempSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterAll, assert, layer } from "@effect/vitest"
import { Chunk, Deferred, Effect, Fiber, Option, Stream } from "effect"
import type { CommandSpec } from "../../src/guest/Exec.ts"
import { cli, Guest, guest, settled, sh, sha256, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))

/** The same bytes every time, and no two blocks alike. */
const noise = (bytes: number): Buffer => {
  const block = Buffer.alloc(bytes)
  let state = 0x9e3779b9
  for (let at = 0; at + 4 <= bytes; at += 4) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    block.writeUInt32LE(state, at)
  }
  return block
}

const mib = 2 ** 20

layer(guest(home, { memoryMib: 512, rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "a command",
  (it) => {
    const exits: ReadonlyArray<readonly [what: string, script: string, code: number, signal: number | null]> = [
      ["success", "true", 0, null],
      ["a code", "exit 7", 7, null],
      ["the highest code", "exit 255", 255, null],
      ["SIGKILL", "kill -KILL $$", 137, 9],
      ["SIGTERM", "kill -TERM $$", 143, 15],
      ["SIGSEGV", "kill -SEGV $$", 139, 11]
    ]
    for (const [what, script, exitCode, signal] of exits) {
      it.effect(`ends with ${what}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const result = yield* vm.execRaw({ argv: ["sh", "-c", script] })
          assert.strictEqual(result.exitCode, exitCode)
          assert.strictEqual(result.signal, signal)
          assert.isFalse(result.oomKilled)
        })
      )
    }

    const refused: ReadonlyArray<readonly [what: string, command: CommandSpec, code: string]> = [
      ["a command that is not there", { argv: ["no-such-command"] }, "EXEC_COMMAND_NOT_FOUND"],
      ["an absolute path that is not there", { argv: ["/bin/no-such-command"] }, "EXEC_COMMAND_NOT_FOUND"],
      ["a file that is not executable", { argv: ["/etc/passwd"] }, "EXEC_NOT_EXECUTABLE"],
      ["a directory", { argv: ["/etc"] }, "EXEC_NOT_EXECUTABLE"],
      ["a missing working directory", { argv: ["true"], cwd: "/no/such/directory" }, "EXEC_CWD_INVALID"],
      ["a working directory that is a file", { argv: ["true"], cwd: "/etc/passwd" }, "EXEC_CWD_INVALID"],
      ["a relative working directory", { argv: ["true"], cwd: "etc" }, "EXEC_CWD_INVALID"],
      ["NUL in an argument", { argv: ["echo", "a\0b"] }, "EXEC_ARGUMENT_INVALID"],
      ["NUL in the environment", { argv: ["true"], env: { A: "\0" } }, "EXEC_ARGUMENT_INVALID"],
      ["`=` in a variable's name", { argv: ["true"], env: { "A=B": "" } }, "EXEC_ARGUMENT_INVALID"],
      ["an empty command", { argv: [""] }, "EXEC_ARGUMENT_INVALID"],
      ["2 MiB of environment", { argv: ["true"], env: bigEnvironment(2 * mib) }, "EXEC_ARGUMENTS_TOO_LARGE"],
      ["an argument of 200 KiB", { argv: ["echo", "x".repeat(200 * 1024)] }, "EXEC_ARGUMENTS_TOO_LARGE"]
    ]
    for (const [what, command, code] of refused) {
      it.effect(`is refused: ${what}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const error = yield* Effect.flip(vm.execRaw(command))
          assert.strictEqual(error.code, code)
          assert.isNotEmpty(error.message)
          assert.strictEqual(yield* sh(vm, "echo fine"), "fine")
        })
      )
    }

    it.effect("takes 1 MiB of environment", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const { exitCode, stdout } = yield* vm.execRaw({
          argv: ["sh", "-c", "env | grep -c ^BIG"],
          env: bigEnvironment(mib)
        })
        assert.deepStrictEqual([exitCode, text(stdout)], [0, "32\n"])
      })
    )

    it.effect("gets its arguments and environment as they are", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const argv = ["", " ", "$HOME", "`id`", "ä€😀", "a\nb", "'\"\\", "-n", "--"]
        const { stdout } = yield* vm.execRaw({
          argv: ["sh", "-c", 'printf "%s\\0" "$@" "$VALUE"', "sh", ...argv],
          env: { VALUE: "1\n2 " }
        })
        assert.deepStrictEqual(text(stdout).split("\0").slice(0, -1), [...argv, "1\n2 "])
      })
    )

    it.effect("keeps stdout and stderr apart", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const { exitCode, stderr, stdout } = yield* vm.execRaw({ argv: ["sh", "-c", "echo out; echo err >&2; exit 3"] })
        assert.deepStrictEqual([exitCode, text(stdout), text(stderr)], [3, "out\n", "err\n"])
      })
    )

    it.effect("shows output that is no text without loss in JSON", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const script = "printf 'a\\377'; echo text >&2"
        const { stdout } = yield* cli(home, ["exec", "--json", vm.id, "--", "sh", "-c", script])
        const { stderr, stderrBase64, stdoutBase64 } = JSON.parse(stdout)
        assert.deepStrictEqual([stderr, stderrBase64, stdoutBase64], ["text\n", undefined, "Yf8="])
      })
    )

    it.effect("is killed when it prints more than is kept", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const error = yield* Effect.flip(vm.execRaw({ argv: ["cat", "/dev/zero"] }, { maxOutputBytes: mib }))
        assert.strictEqual(error.code, "EXEC_OUTPUT_TOO_LARGE")
        yield* untilGuestPrints("ps | grep -c '[c]at /dev/zero' || true", "0")
      })
    )

    it.scoped("reports how it ended even when its output is not read", () =>
      Effect.gen(function* () {
        const running = yield* (yield* Guest).start("head -c 10000000 /dev/zero; exit 5")
        assert.strictEqual((yield* Effect.timeout(running.exit, "20 seconds")).code, 5)
      })
    )

    it.effect("fails for a code other than 0, with what it said", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        assert.strictEqual(text((yield* vm.exec("echo fine")).stdout), "fine\n")
        const error = yield* Effect.flip(vm.exec("echo out; echo why >&2; exit 3"))
        assert.deepStrictEqual([error.code, error.exitCode], ["EXEC_NONZERO_EXIT", 3])
        assert.include(error.message, "code 3: why")
      })
    )

    it.effect("reads nothing without stdin", () =>
      Effect.gen(function* () {
        const { stdout } = yield* (yield* Guest).execRaw({ argv: ["sh", "-c", "cat; echo done"] })
        assert.strictEqual(text(stdout), "done\n")
      })
    )

    it.effect(
      "gives back 100 MiB of stdin unchanged",
      () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const block = noise(mib)
          const stdin = Stream.fromIterable(Array.from({ length: 100 }, () => block)).pipe(Stream.rechunk(1))
          const { exitCode, stdout } = yield* vm.execRaw({ argv: ["cat"], stdin })
          assert.strictEqual(exitCode, 0)
          assert.strictEqual(stdout.length, 100 * mib)
          assert.strictEqual(sha256(stdout), sha256(Buffer.concat(Array.from({ length: 100 }, () => block))))
        }),
      180_000
    )

    it.scoped(
      "waits for a reader that stalls, without delaying other commands",
      () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const total = 256 * mib
          const running = yield* vm.start({ argv: ["sh", "-c", `dd if=/dev/zero bs=64k count=${total / 65536}`] })
          const gate = yield* Deferred.make<void>()
          const stalled = yield* Deferred.make<void>()
          const reading = yield* Effect.fork(
            running.output.pipe(
              Stream.filter(({ channel }) => channel === "stdout"),
              Stream.runFoldEffect(0, (sum, { bytes }) =>
                Effect.gen(function* () {
                  if (sum === 0) {
                    yield* Deferred.succeed(stalled, undefined)
                    yield* Deferred.await(gate)
                  }
                  return sum + bytes.length
                })
              )
            )
          )
          yield* Deferred.await(stalled)
          for (let turn = 0; turn < 5; turn++) assert.strictEqual(yield* sh(vm, "echo responsive"), "responsive")
          // what is under way is bounded: the command cannot have written everything
          assert.strictEqual(yield* sh(vm, `kill -0 ${running.pid} && echo alive`), "alive")
          yield* Deferred.succeed(gate, undefined)
          assert.strictEqual(yield* Fiber.join(reading), total)
          assert.strictEqual((yield* running.exit).code, 0)
        }),
      180_000
    )

    it.scoped("can be spoken with while it runs", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const heard = yield* Deferred.make<void>()
        const stdin = Stream.concat(
          Stream.make(Buffer.from("ping\n")),
          Stream.fromEffect(Effect.as(Deferred.await(heard), Buffer.from("bye\n")))
        )
        const running = yield* vm.start({ argv: ["sh", "-c", "read a; echo got $a; read b; echo got $b"], stdin })
        const output = yield* running.output.pipe(
          Stream.map(({ bytes }) => text(bytes)),
          Stream.tap((part) => (part.includes("ping") ? Deferred.succeed(heard, undefined) : Effect.void)),
          Stream.runCollect
        )
        assert.strictEqual(Chunk.join(output, ""), "got ping\ngot bye\n")
      })
    )

    const tree = "sleep 1001 & sleep 1001 & echo ready; wait"
    const sleepers = "ps | grep -c ' [s]leep 1001$' || true"

    it.effect("is killed at its time limit, with its process group", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const error = yield* Effect.flip(vm.execRaw({ argv: ["sh", "-c", tree] }, { timeout: "500 millis" }))
        assert.strictEqual(error.code, "EXEC_AGENT_TIMEOUT")
        // the command may have done its work by then: a loop that tries again would do it twice
        assert.isFalse(error.retryable)
        yield* untilGuestPrints(sleepers, "0")
      })
    )

    it.effect("is killed at its time limit also when it does not read what is sent to it", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const stdin = Stream.repeatEffect(Effect.sync(() => Buffer.alloc(65536)))
        const stuck = { argv: ["sh", "-c", "exec sleep 1717"], stdin } as const
        const error = yield* Effect.flip(vm.execRaw(stuck, { timeout: "2 seconds" }))
        assert.strictEqual(error.code, "EXEC_AGENT_TIMEOUT")
        assert.strictEqual(yield* sh(vm, "ps | grep -c ' [s]leep 1717$' || true"), "0")
      })
    )

    it.effect("is killed when its caller is interrupted", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const ready = yield* Deferred.make<void>()
        const fiber = yield* Effect.fork(
          Effect.scoped(
            Effect.flatMap(vm.start({ argv: ["sh", "-c", tree] }), (running) =>
              Stream.runForEach(running.output, () => Deferred.succeed(ready, undefined))
            )
          )
        )
        yield* Deferred.await(ready)
        assert.strictEqual(yield* sh(vm, sleepers), "2")
        yield* Fiber.interrupt(fiber)
        yield* untilGuestPrints(sleepers, "0")
      })
    )

    it.effect("does not wait for children that hold its pipes", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const { exitCode, stdout } = yield* vm.execRaw(
          { argv: ["sh", "-c", "sleep 1002 & echo parent; exit 4"] },
          { timeout: "20 seconds" }
        )
        assert.deepStrictEqual([exitCode, text(stdout)], [4, "parent\n"])
        yield* sh(vm, "killall sleep")
      })
    )

    for (const [name, number] of [
      ["INT", 2],
      ["USR1", 10],
      ["TERM", 15]
    ] as const) {
      it.scoped(`gets SIG${name}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const running = yield* vm.start({
            argv: ["sh", "-c", `trap 'echo caught; exit 5' ${name}; echo ready; while :; do sleep 0.05; done`]
          })
          const output = yield* running.output.pipe(
            Stream.filter(({ channel }) => channel === "stdout"), // the shell may say on stderr that its child was hit too
            Stream.map(({ bytes }) => text(bytes)),
            Stream.tap((part) => (part.includes("ready") ? running.signal(number) : Effect.void)),
            Stream.runCollect
          )
          assert.strictEqual(Chunk.join(output, ""), "ready\ncaught\n")
          assert.strictEqual((yield* running.exit).code, 5)
        })
      )
    }

    it.effect("runs beside 19 others", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const answers = yield* Effect.forEach(
          Array.from({ length: 20 }, (_, n) => n),
          (n) => sh(vm, `echo ${n}; sleep 0.2; echo ${n}`),
          {
            concurrency: "unbounded"
          }
        )
        assert.deepStrictEqual(
          answers,
          Array.from({ length: 20 }, (_, n) => `${n}\n${n}`)
        )
      })
    )

    it.effect("finds itself in a session, a cgroup and an environment of its own", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        assert.strictEqual(yield* sh(vm, "cat /proc/self/cgroup"), "0::/workload")
        assert.strictEqual(yield* sh(vm, 'test $$ = "$(cut -d" " -f6 /proc/$$/stat)" && echo leader'), "leader")
        assert.match(yield* sh(vm, "echo $HOME:$PATH"), /^\/root:.*\/bin/)
        assert.strictEqual(yield* sh(vm, "ls /proc/self/fd | wc -l"), "4") // 0, 1, 2 and ls's own
        assert.match(yield* sh(vm, "grep SigBlk /proc/self/status"), /\s0+$/)
      })
    )

    it.scoped("statistics are those of the guest", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.start({ argv: ["sleep", "1000"] })
        const stats = yield* vm.stats
        assert.isAtMost(stats.memory.totalBytes, 512 * mib)
        assert.isAbove(stats.memory.availableBytes, 100 * mib)
        assert.isAbove(stats.diskTotalBytes, 3 * 2 ** 30)
        assert.isAbove(stats.processes, 0)
        assert.isAbove(stats.uptimeMs, 0)
      })
    )

    const untilGuestPrints = (script: string, wanted: string) =>
      Effect.gen(function* () {
        const vm = yield* Guest
        for (let turn = 0; turn < 100; turn++) {
          if ((yield* sh(vm, script)) === wanted) return
        }
        assert.fail(`${script} never printed ${wanted}`)
      })
  }
)

layer(guest(home, { memoryMib: 128, rootDiskSizeBytes: 32 * mib }), { excludeTestServices: true, timeout: 60_000 })(
  "a small guest",
  (it) => {
    it.effect(
      "without memory tells its command was ended for that, and stays usable",
      () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const before = (yield* vm.stats).oomKills
          const result = yield* vm.execRaw({ argv: ["tail", "/dev/zero"] })
          assert.deepStrictEqual([result.exitCode, result.signal, result.oomKilled], [137, 9, true])
          assert.isAbove((yield* vm.stats).oomKills, before)
          assert.strictEqual(yield* sh(vm, "echo alive"), "alive")
        }),
      120_000
    )

    it.effect("with a full disk says so and stays usable", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const filling = yield* vm.execRaw({ argv: ["sh", "-c", "dd if=/dev/zero of=/fill bs=64k"] })
        assert.strictEqual(filling.exitCode, 1)
        assert.include(text(filling.stderr), "No space left on device")
        const error = yield* Effect.flip(vm.writeFile("/more", noise(4 * mib)))
        assert.strictEqual(error.code, "FILES_NO_SPACE")
        assert.isDefined(error.hint)
        const source = mkdtempSync(path.join(home, "push-"))
        writeFileSync(path.join(source, "large"), noise(4 * mib))
        assert.strictEqual((yield* Effect.flip(vm.push(source, "/pushed"))).code, "FILES_NO_SPACE")
        yield* sh(vm, "rm -rf /fill /more /pushed; sync")
        yield* vm.writeFile("/more", noise(mib))
        assert.strictEqual((yield* vm.stat("/more")).size, mib)
        assert.isTrue(Option.isSome(yield* Effect.option(vm.stats)))
      })
    )
  }
)

function bigEnvironment(bytes: number): Record<string, string> {
  const each = 32 * 1024
  return Object.fromEntries(Array.from({ length: bytes / each }, (_, n) => [`BIG${n}`, "v".repeat(each - 16)]))
}
