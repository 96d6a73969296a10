import { Effect, Queue, Stream } from "effect"
import type { ExecError } from "../../src/errors.ts"
import type { TerminalCommand } from "../../src/guest/Terminal.ts"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import * as HostPty from "../../src/platform/HostPty.ts"
import { Settings } from "../../src/Settings.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { environment } from "../../test/host.ts"
import { bundle } from "../bundle.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"

/** A terminal that echoes keys. */
interface Echo {
  readonly press: (key: Uint8Array) => Effect.Effect<void, ExecError>
  readonly seen: Effect.Effect<Uint8Array>
}

const seenOf = Effect.fnUntraced(function* (output: Stream.Stream<Uint8Array, ExecError>) {
  const pieces = yield* Queue.unbounded<Uint8Array>()
  yield* Effect.forkScoped(Effect.ignore(Stream.runForEach(output, (bytes) => Queue.offer(pieces, bytes))))
  return Queue.take(pieces)
})

const inTerminal = (vm: Vm, command: TerminalCommand, session?: string) =>
  Effect.gen(function* () {
    const options = { columns: 80, rows: 24, ...(session === undefined ? {} : { session }) }
    const opened = yield* vm.terminal(command, options)
    const echo: Echo = { press: opened.write, seen: yield* seenOf(opened.output) }
    return echo
  })

/** The whole way: keys are typed into a terminal of this host, in which the CLI runs. */
const attached = Effect.fnUntraced(function* (vm: Vm) {
  const { home } = yield* Settings
  const cliPath = yield* bundle
  const args = [cliPath, "attach", vm.id, "--", "sh", "-c", rawCat]
  const pty = yield* Effect.acquireRelease(
    Effect.sync(() =>
      HostPty.spawn(process.execPath, args, {
        name: "xterm",
        cols: 80,
        rows: 24,
        cwd: process.cwd(),
        env: { ...process.env, ...environment(home) },
        encoding: null
      })
    ),
    (pty) =>
      Effect.async<void>((resume) => {
        pty.onExit(() => resume(Effect.void))
        pty.kill("SIGTERM")
      }).pipe(Effect.interruptible, Effect.timeout("5 seconds"), Effect.ignore)
  )
  const pieces = yield* Queue.unbounded<Uint8Array>()
  pty.onData((bytes) => pieces.unsafeOffer(bytes))
  const echo: Echo = { press: (key) => Effect.sync(() => pty.write(key)), seen: Queue.take(pieces) }
  return echo
})

const pipes = (vm: Vm) =>
  Effect.gen(function* () {
    const keys = yield* Queue.unbounded<Uint8Array>()
    const cat = yield* vm.start({ argv: ["cat"], stdin: Stream.fromQueue(keys) })
    const echo: Echo = {
      press: (key) => Queue.offer(keys, key),
      seen: yield* seenOf(Stream.map(cat.output, ({ bytes }) => bytes))
    }
    return echo
  })

const key = Buffer.from("k")

/** A command that prints a newline and then echoes keys itself. */
const rawCat = "stty raw -echo; echo; exec cat"

const pressed = (name: string, { press, seen }: Echo, runs: number): Variant => ({
  name,
  runs,
  warmup: 50,
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      yield* press(key)
      const bytes = yield* seen
      yield* mark("echo")
      if (!key.equals(bytes)) {
        return yield* new BenchError({ message: `for a key came ${JSON.stringify(Buffer.from(bytes).toString())}` })
      }
    })
})

/** Keys that are sent without a newline. The kernel keeps at most 4095 for a program that has not read them. */
const most = 4000

export const terminal: Scenario = {
  name: "terminal",
  description:
    "a key and its echo: by the terminal, by a program in it, by that program behind `attach`, and through pipes",
  setup: Effect.fn("terminal.setup")(function* ({ images, runs = 500 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const { vm } = yield* machinen.boot({ image, memoryMib: defaultMemoryMib })
    const raw = yield* inTerminal(vm, rawCat)
    const attach = yield* attached(vm)
    yield* Effect.all([raw.seen, attach.seen])
    const samples = Math.min(runs, most - 50)
    return {
      warmup: 0,
      runs: samples,
      variants: [
        pressed("pipes, cat", yield* pipes(vm), samples),
        pressed("terminal", yield* inTerminal(vm, "exec sleep infinity"), samples),
        pressed("terminal, cat", raw, samples),
        pressed("attach", attach, samples),
        pressed("session", yield* inTerminal(vm, "exec sleep infinity", "bench"), samples)
      ],
      settings: { image, memoryMib: defaultMemoryMib, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) =>
        ["terminal", "terminal, cat", "attach", "session"].map((name) =>
          atMost(`${name}: a key's echo (median)`, "ms", p50(results, name, "echo"), 10)
        )
    }
  })
}
