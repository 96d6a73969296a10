import { readFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Cause, ConfigProvider, type Console, Effect, Exit, Layer, Option, Stream } from "effect"
import { cli, type Services } from "../../../src/cli/app.ts"
import { unusable } from "../../../src/cli/environment.ts"
import { ExitWith } from "../../../src/cli/exit.ts"
import * as Invocation from "../../../src/cli/invocation.ts"
import * as usage from "../../../src/cli/usage.ts"
import { ExecError } from "../../../src/errors.ts"
import { Machinen } from "../../../src/Machinen.ts"
import { ExitStatus, VmId, VmName } from "../../../src/machine/MachineSpec.ts"
import { ExitRecord } from "../../../src/machine/ShimPlan.ts"
import { VmEntry } from "../../../src/machine/VmEntry.ts"
import { Settings } from "../../../src/Settings.ts"
import type { Vm } from "../../../src/vm/Vm.ts"

const flags: ReadonlyArray<usage.Flag> = [
  { names: ["--detach", "-d"], takesValue: false, repeatable: false },
  { names: ["--tty", "-t"], takesValue: false, repeatable: false },
  { names: ["--tail-bytes"], takesValue: true, repeatable: false },
  { names: ["--name", "-n"], takesValue: true, repeatable: false },
  { names: ["--publish", "-p"], takesValue: true, repeatable: true }
]

describe("options", () => {
  const accepted: ReadonlyArray<readonly [args: string, normal: ReadonlyArray<string>]> = [
    ["-dt x", ["-d", "-t", "x"]],
    ["-tp 8080:80 x", ["-t", "-p", "8080:80", "x"]],
    ["-d x -d", ["-d", "x"]],
    ["x --name=a=b", ["x", "--name", "a=b"]],
    ["--name= x", ["--name", "", "x"]],
    ["--name=-5", ["--name", "-5"]],
    ["-p 1:1 -p 2:2", ["-p", "1:1", "-p", "2:2"]],
    ["-", ["-"]],
    ["-d --help -xyz", ["-d", "--help", "-xyz"]]
  ]
  for (const [args, normal] of accepted) {
    it.effect(`${args} is ${normal.join(" ")}`, () =>
      Effect.gen(function* () {
        assert.deepStrictEqual(yield* usage.normalize(flags, args.split(" ")), normal)
      })
    )
  }

  const refused: ReadonlyArray<readonly [args: string, code: string, culprit: string]> = [
    ["-xyz x", "PARSE_FLAG_UNKNOWN", "-x (in -xyz)"],
    ["-dx x", "PARSE_FLAG_UNKNOWN", "-x (in -dx)"],
    ["-x", "PARSE_FLAG_UNKNOWN", "option -x"],
    ["-5", "PARSE_FLAG_UNKNOWN", "option -5"],
    ["--tail 2 x", "PARSE_FLAG_UNKNOWN", "option --tail"],
    ["--what=2 x", "PARSE_FLAG_UNKNOWN", "option --what"],
    ["-p8080:80 x", "PARSE_FLAG_MALFORMED", "-p in -p8080:80"],
    ["-n a --name b", "PARSE_FLAG_DUPLICATE", "--name"],
    ["-tn", "PARSE_FLAG_MISSING_VALUE", "-n needs"],
    ["--name -d x", "PARSE_FLAG_MISSING_VALUE", "--name needs"]
  ]
  for (const [args, code, culprit] of refused) {
    it.effect(`${args} is refused, for ${culprit}`, () =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(usage.normalize(flags, args.split(" ")))
        assert.strictEqual(error.code, code)
        assert.include(error.message, culprit)
        assert.isNotEmpty(error.hint)
      })
    )
  }
})

/** One VM, which answers what a verb asks of it. */
const entry = new VmEntry({
  version: 1,
  id: VmId.make("a0123456789b"),
  name: VmName.make("web"),
  state: "running",
  bootId: "boot",
  owner: { pid: 1, startTime: 1 },
  image: "micro",
  memoryMib: 512,
  vcpus: 1,
  network: "nat",
  backend: "qemu",
  accel: "tcg",
  detached: true,
  createdAt: 1_700_000_000_000,
  vsockPath: "/nowhere/vsock.sock",
  controlPath: "/nowhere/control.sock"
})

const ended = new ExitRecord({
  vmm: { code: 0, signal: null },
  main: null,
  orderly: true,
  reason: "stop",
  consoleTail: "",
  vmmLogTail: ""
})

const hostile = "\x1b[2J\x9b31m\u202e\nroot@host# "
const vm = {
  entry,
  id: entry.id,
  name: entry.name,
  stop: () => Effect.succeed(ended),
  kill: Effect.succeed(ended),
  memoryStats: Effect.succeed({ ceilingMib: 512, hostRssBytes: null, lazyPagesPending: 0 }),
  stats: Effect.fail(new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "no guest" })),
  sessions: Effect.succeed([
    {
      name: "work",
      pid: 7,
      argv: ["sh", "-c", hostile],
      createdMs: 1_700_000_000_000,
      attached: false,
      columns: 80,
      rows: 24,
      ended: null
    }
  ]),
  execRaw: () =>
    Effect.succeed({
      exitCode: 137,
      signal: 9,
      oomKilled: true,
      stdout: Buffer.from(hostile),
      stderr: Buffer.from("")
    }),
  start: () =>
    Effect.succeed({
      pid: 9,
      output: Stream.empty,
      exit: Effect.succeed(new ExitStatus({ code: 137, signal: 9, oomKilled: true })),
      signal: () => Effect.void
    })
} as unknown as Vm

const fakes = Layer.mergeAll(
  NodeContext.layer,
  Settings.layerTest("/nowhere"),
  Layer.succeed(
    Machinen,
    Machinen.of({
      list: Effect.succeed([entry]),
      attach: () => Effect.succeed(vm),
      gc: () =>
        Effect.succeed([{ id: entry.id, name: entry.name, removedPaths: ["/nowhere/a"], failedPaths: ["/nowhere/b"] }])
    } as unknown as Machinen["Type"])
  )
) as unknown as Layer.Layer<Services>

/** What it prints on both channels, and how it ends. */
const run = <E>(args: ReadonlyArray<string>, services: Layer.Layer<Services, E> = fakes as never) =>
  Effect.gen(function* () {
    const printed = { stdout: "", stderr: "" }
    const console = yield* Effect.console
    const to = (channel: keyof typeof printed) => (text: unknown) =>
      Effect.sync(() => {
        printed[channel] += `${String(text)}\n`
      })
    const exit = yield* cli(Invocation.of(["node", "machinen", ...args]), services).pipe(
      Effect.withConsole({ ...console, log: to("stdout"), error: to("stderr") } as Console.Console),
      Effect.provide(NodeContext.layer),
      Effect.exit
    )
    const failure = Exit.isFailure(exit) ? Option.getOrUndefined(Cause.failureOption(exit.cause)) : undefined
    return { ...printed, exit, failure }
  })

const golden = JSON.parse(
  readFileSync(path.join(import.meta.dirname, "..", "..", "golden", "cli.json"), "utf8")
) as Readonly<Record<string, unknown>>

describe("the CLI on fakes", () => {
  for (const [line, wanted] of Object.entries(golden)) {
    it.effect(`prints the JSON of \`${line}\``, () =>
      Effect.gen(function* () {
        const { exit, failure, stdout } = yield* run(line.split(" "))
        if (Exit.isFailure(exit)) assert.instanceOf(failure, ExitWith)
        assert.deepStrictEqual(JSON.parse(stdout), wanted)
        // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what it is about
        assert.notMatch(stdout, /[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]/)
      })
    )
  }

  it.effect("shows what a guest chose on one line, with its controls escaped", () =>
    Effect.gen(function* () {
      const { stdout } = yield* run(["sessions", "web"])
      assert.lengthOf(stdout.trimEnd().split("\n"), 2)
      assert.include(stdout, "sh -c \\e[2J\\x9b31m\\u{202e}\\nroot@host# ")
    })
  )

  it.effect("says that the guest ran out of memory, where the command's end does not", () =>
    Effect.gen(function* () {
      const { failure, stderr, stdout } = yield* run(["exec", "web", "--", "hog"])
      assert.deepStrictEqual([failure instanceof ExitWith && failure.code, stdout], [137, ""])
      assert.include(stderr, "ran out of memory")
    })
  )

  const refused: ReadonlyArray<readonly [line: string, code: string, culprit: string]> = [
    ["exec -d web -- x", "PARSE_FLAG_UNKNOWN", "-d"],
    ["stop --all", "PARSE_FLAG_UNKNOWN", "--all"],
    ["logs --tail 2 web", "PARSE_FLAG_UNKNOWN", "--tail"],
    ["logs -fx web", "PARSE_FLAG_UNKNOWN", "-x (in -fx)"],
    ["boot -dx", "PARSE_FLAG_UNKNOWN", "-x (in -dx)"],
    ["image ls --bogus", "PARSE_FLAG_UNKNOWN", "--bogus"],
    ["image nosuch", "PARSE_COMMAND_UNKNOWN", "image nosuch"],
    ["constructor", "PARSE_COMMAND_UNKNOWN", "constructor"],
    ["--log-level nope ls", "PARSE_FLAG_MALFORMED", '"nope"'],
    ["ls --log-level", "PARSE_FLAG_MISSING_VALUE", "--log-level"]
  ]
  for (const [line, code, culprit] of refused) {
    it.effect(`refuses \`${line}\` for ${culprit}`, () =>
      Effect.gen(function* () {
        const { failure, stdout } = yield* run(line.split(" "))
        assert.deepInclude(failure, { _tag: "ParseError", code })
        assert.include((failure as Error).message, culprit)
        assert.strictEqual(stdout, "")
      })
    )
  }

  const bad = (name: string, value: string) =>
    Layer.provide(
      Settings.layer,
      Layer.setConfigProvider(ConfigProvider.fromMap(new Map([[name, value]]), { pathDelim: "_" }))
    ).pipe(Layer.mapError(unusable)) as unknown as Layer.Layer<Services, unknown>

  it.effect("refuses a setting it cannot use, by name", () =>
    Effect.gen(function* () {
      for (const [name, value] of [
        ["MACHINEN_ACCEL", "bad"],
        ["MACHINEN_BOOT_TIMEOUT", "60"]
      ] as const) {
        const { failure } = yield* run(["ls"], bad(name, value))
        assert.deepInclude(failure, { _tag: "ParseError", code: "PARSE_ENVIRONMENT_INVALID" })
        assert.include((failure as Error).message, `${name}: `)
        assert.include((failure as Error).message, `"${value}"`)
      }
    })
  )

  it.effect("needs no settings for help and version", () =>
    Effect.gen(function* () {
      for (const [args, text] of [
        [["--help"], "session-kill"],
        [["--version"], "0.1.0"],
        [["run", "--help"], "--mount-live"],
        [["image", "--help"], "export"]
      ] as const) {
        const { exit, stdout } = yield* run(args, bad("MACHINEN_ACCEL", "bad"))
        assert.isTrue(Exit.isSuccess(exit), args.join(" "))
        assert.include(stdout, text)
      }
    })
  )
})
