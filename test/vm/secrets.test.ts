import { spawnSync } from "node:child_process"
import { randomBytes } from "node:crypto"
import { writeFileSync } from "node:fs"
import * as path from "node:path"
import { inspect } from "node:util"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Redacted, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { Secrets } from "../../src/machine/Secrets.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { cli, hostProcesses, live, newBundle, settled, sh, startCli, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

const options = { image: "micro", rootDiskSizeBytes: 64 * 2 ** 20, memoryMib: 128 } as const
const boot = (secrets: Secrets, command?: ReadonlyArray<string>) =>
  Effect.flatMap(Machinen, (m) => m.boot({ ...options, secrets, ...(command === undefined ? {} : { command }) }))

/** A value that is nowhere else. */
const fresh = () => `value-${randomBytes(16).toString("hex")}`

/** Files below a directory that hold the value; it is on no command line here either. */
const holding = (dir: string, value: string): ReadonlyArray<string> => {
  const { status, stdout } = spawnSync("grep", ["-rlaF", "--devices=skip", "-f", "-", dir], {
    input: value,
    encoding: "utf8"
  })
  assert.include([0, 1], status)
  return stdout.split("\n").filter((file) => file !== "")
}

/** The command lines of this host's processes that show it in their arguments or their environment. */
const showing = (value: string): ReadonlyArray<string> =>
  hostProcesses()
    .filter(({ argv, environment }) => [...argv, ...environment].some((shown) => shown.includes(value)))
    .map(({ argv }) => argv.join(" "))

const search = `cat > /dev/shm/p
for file in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do
  tr '\\0' '\\n' <$file 2>/dev/null | grep -qFf /dev/shm/p && echo $file
done
rm /dev/shm/p`

/** The same in the guest; what is searched for comes on stdin. */
const shownInGuest = (vm: Vm, value: string) =>
  Effect.map(
    vm.execRaw({
      argv: ["sh", "-c", search],
      stdin: Stream.make(Buffer.from(value))
    }),
    ({ stdout }) =>
      text(stdout)
        .split("\n")
        .filter((line) => line !== "")
  )

const valueOf = (vm: Vm, name: string, secrets: ReadonlyArray<string>) =>
  Effect.map(vm.execRaw({ argv: ["sh", "-c", `echo "$${name}"`], secrets }), ({ stdout }) => text(stdout).trimEnd())

describe("secrets", () => {
  it.scoped("are in the environment of the commands that name them, and nowhere else", () =>
    Effect.gen(function* () {
      const [value, other] = [fresh(), fresh()]
      const { vm } = yield* boot({ TOKEN: Redacted.make(value), OTHER: other })
      assert.strictEqual(yield* valueOf(vm, "TOKEN", ["TOKEN"]), value)
      assert.strictEqual(yield* valueOf(vm, "OTHER", ["TOKEN"]), "")
      assert.strictEqual(yield* valueOf(vm, "TOKEN", []), "")
      const bystander = yield* vm.start({ argv: ["sleep", "1000"] })
      const user = yield* vm.start({ argv: ["sleep", "1000"], secrets: ["TOKEN"] })
      assert.deepStrictEqual(yield* shownInGuest(vm, value), [`/proc/${user.pid}/environ`])
      assert.notStrictEqual(user.pid, bystander.pid)
      assert.deepStrictEqual(showing(value), [])
      assert.isNotEmpty(showing(vm.id), "it looked where processes are")
      // a secret that the guest had written would be where this is
      const written = fresh()
      yield* sh(vm, `echo ${written} >/root/written; sync`)
      assert.deepStrictEqual(holding(home, written), [path.join(home, "vms", vm.id, "upper.img")])
      assert.deepStrictEqual(holding(home, value), [])

      const unknown = yield* Effect.flip(vm.execRaw({ argv: ["true"], secrets: ["NONE"] }))
      assert.strictEqual(unknown.code, "EXEC_SECRET_UNKNOWN")
      yield* vm.forgetSecrets
      const forgotten = yield* Effect.flip(vm.execRaw({ argv: ["true"], secrets: ["TOKEN"] }))
      assert.strictEqual(forgotten.code, "EXEC_SECRET_UNKNOWN")
      assert.notInclude(`${unknown.message}${forgotten.message}`, value)
    }).pipe(Effect.provide(live(home)))
  )

  it.scoped("are the main command's from its start", () =>
    Effect.gen(function* () {
      const value = fresh()
      const { vm } = yield* boot({ TOKEN: value }, ["sh", "-c", 'echo "got $TOKEN"'])
      const main = yield* vm.startMain()
      const output = yield* Stream.mkString(Stream.map(main.output, ({ bytes }) => text(bytes)))
      assert.strictEqual(output, `got ${value}\n`)
    }).pipe(Effect.provide(live(home)))
  )

  it.scoped(
    "are refused before anything is sent or started when a value has a newline or is too large; invalid names are skipped",
    () =>
      Effect.gen(function* () {
        const { vm } = yield* boot({})
        const value = fresh()
        for (const bad of [`${value}\nlines`, `${value}\0`, value.repeat(128 * 1024)]) {
          const error = yield* Effect.flip(vm.secrets({ FINE: "fine", BAD: bad }))
          assert.deepStrictEqual([error.code, error.retryable], ["SECRETS_VALUE_INVALID", false])
          assert.notInclude(inspect(error, { depth: null }), value)
        }
        assert.strictEqual(
          (yield* Effect.flip(vm.execRaw({ argv: ["true"], secrets: ["FINE"] }))).code,
          "EXEC_SECRET_UNKNOWN"
        )
        assert.deepStrictEqual(
          { ...(yield* vm.secrets({ "1A": "x", "A-B": "y", GOOD: "z" })) },
          { stored: 1, skipped: ["1A", "A-B"] }
        )
        assert.strictEqual(yield* valueOf(vm, "GOOD", ["GOOD"]), "z")
        const refused = yield* Effect.flip(Effect.asVoid(boot({ BAD: "two\nlines" })))
        assert.strictEqual(refused.code, "SECRETS_VALUE_INVALID")
        const many = Object.fromEntries(Array.from({ length: 9 }, (_, n) => [`N${n}`, "x".repeat(100_000)]))
        yield* vm.secrets(many)
        assert.strictEqual(
          (yield* Effect.flip(vm.secrets({ ...many, N10: "x".repeat(100_000), N11: "y".repeat(100_000) }))).code,
          "SECRETS_VALUE_INVALID"
        )
      }).pipe(Effect.provide(live(home)))
  )

  it.scoped("are in no copy of the VM that is not given them, and in nothing of a bundle but its memory", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const value = fresh()
      const { vm } = yield* boot({ TOKEN: value })
      assert.strictEqual(yield* valueOf(vm, "TOKEN", ["TOKEN"]), value)
      const written = fresh()
      yield* sh(vm, `echo ${written} >/root/written`)
      const outDir = newBundle()
      yield* machinen.snapshot(vm, { outDir, leaveRunning: true })
      const besidesMemory = (value: string) =>
        holding(outDir, value)
          .map((file) => path.basename(file))
          .filter((name) => name !== "memory")
      assert.deepStrictEqual(besidesMemory(written), ["upper.img"])
      assert.deepStrictEqual(besidesMemory(value), [])
      assert.strictEqual(yield* valueOf(vm, "TOKEN", ["TOKEN"]), value)

      const { siblings } = yield* machinen.fork(vm)
      const copies = [...siblings, yield* machinen.restore({ snapDir: outDir })]
      for (const copy of copies) {
        const error = yield* Effect.flip(copy.vm.execRaw({ argv: ["true"], secrets: ["TOKEN"] }))
        assert.strictEqual(error.code, "EXEC_SECRET_UNKNOWN")
        assert.deepStrictEqual(yield* shownInGuest(copy.vm, value), [])
      }
      const another = fresh()
      const given = yield* machinen.restore({ snapDir: outDir, secrets: { TOKEN: another } })
      assert.strictEqual(yield* valueOf(given.vm, "TOKEN", ["TOKEN"]), another)
    }).pipe(Effect.provide(live(home)))
  )

  it.effect("come to the CLI from its environment or a file, never from its arguments", () =>
    Effect.gen(function* () {
      const [value, filed] = [fresh(), fresh()]
      const file = path.join(path.dirname(home), "secret-file")
      writeFileSync(file, `${filed}\n`)
      const env = { TOKEN: value, DEBUG: "*" }
      const small = ["--image", "micro", "--disk", "64M", "--memory", "128"]
      const print = ["--", "sh", "-c", 'echo "$TOKEN $FILED"']
      const ran = yield* cli(home, ["run", ...small, "--secret", "TOKEN", "--secret", `FILED=@${file}`, ...print], {
        env
      })
      assert.strictEqual(ran.stdout, `${value} ${filed}\n`)
      assert.notInclude(ran.stderr, value)
      assert.notInclude(ran.stderr, filed)

      const booted = yield* cli(home, ["boot", "-d", ...small, "--name", "kept", "--secret", "TOKEN", "--json"], {
        env
      })
      assert.strictEqual(booted.code, 0, booted.stderr)
      assert.notInclude(`${booted.stdout}${booted.stderr}`, value)
      const used = yield* Effect.scoped(
        Effect.gen(function* () {
          const script = 'echo "$TOKEN"; read line'
          const running = yield* startCli(home, ["exec", "-i", "--secret", "TOKEN", "kept", "--", "sh", "-c", script], {
            stdin: "open"
          })
          yield* running.printed(value)
          return showing(value)
        })
      )
      assert.deepStrictEqual(used, [])
      assert.strictEqual(
        (yield* cli(home, ["exec", "--secret", `FILED=@${file}`, "kept", ...print])).stdout,
        ` ${filed}\n`
      )
      for (const shown of [
        ["inspect", "kept"],
        ["ls", "--json"],
        ["logs", "--console", "kept"]
      ]) {
        const { code, stderr, stdout } = yield* cli(home, shown, { env: { DEBUG: "*" } })
        assert.strictEqual(code, 0, stderr)
        assert.notInclude(`${stdout}${stderr}`, value)
      }
      assert.deepStrictEqual(holding(home, value), [])

      for (const wrong of [`TOKEN=${value}`, "NOT_SET_ANYWHERE", "1A", "FILED=@/no/such/file"]) {
        const refused = yield* cli(home, ["run", ...small, "--secret", wrong, "--", "true"])
        assert.strictEqual(refused.code, 125, JSON.stringify(wrong))
        assert.include(refused.stderr, "PARSE_FLAG_MALFORMED")
        assert.notInclude(refused.stderr, value)
      }
      yield* cli(home, ["stop", "kept"])
    })
  )
})
