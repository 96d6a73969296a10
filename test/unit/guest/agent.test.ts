import { rmSync } from "node:fs"
import * as net from "node:net"
import * as path from "node:path"
import { NodeFileSystem } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Chunk, Effect, Fiber, Layer, Stream } from "effect"
import { Agent, type AgentClient } from "../../../src/guest/Agent.ts"
import { encodeFrame, FrameType } from "../../../src/guest/AgentProtocol.ts"
import type { ExecOptions, RunningCommand } from "../../../src/guest/Exec.ts"
import { Vsock } from "../../../src/guest/Vsock.ts"
import { Assets } from "../../../src/host/Assets.ts"
import { temporaryDirectory, text } from "../../fixtures.ts"

const json = (value: unknown) => Buffer.from(JSON.stringify(value))
const out = (line: string) => encodeFrame(FrameType.stdout, Buffer.from(line))
const err = (line: string) => encodeFrame(FrameType.stderr, Buffer.from(line))
const exit = (code: number) => encodeFrame(FrameType.end, json({ code, signal: null }))

/** What the guest does with each connection in turn; the last is done again. */
type Answer = "hang up" | "say nothing" | ReadonlyArray<Uint8Array> | { readonly late: ReadonlyArray<Uint8Array> }

interface Server {
  readonly calls: () => number
  readonly requests: ReadonlyArray<{ readonly op: string; readonly nowMs?: number; readonly path?: string }>
  readonly vsock: string
}

/** An agent at the end of a hybrid vsock, without a guest. */
const withAgent = <A, E>(
  answers: ReadonlyArray<Answer>,
  use: (client: AgentClient, server: Server) => Effect.Effect<A, E>
) =>
  Effect.gen(function* () {
    const vsock = path.join(temporaryDirectory(), "v.sock")
    let calls = 0
    const requests: Array<Server["requests"][number]> = []
    yield* Effect.acquireRelease(
      Effect.async<net.Server>((resume) => {
        const server = net.createServer((socket) => {
          const answer = answers[Math.min(calls++, answers.length - 1)] ?? "hang up"
          socket.on("error", () => {})
          if (answer === "hang up") return socket.destroy()
          socket.once("data", (greeting) => {
            socket.write("OK 1\n")
            if (answer === "say nothing") return
            const heard = (request: Uint8Array) => {
              requests.push(JSON.parse(text(request.subarray(5))))
              const say = (frames: ReadonlyArray<Uint8Array>) => {
                for (const frame of [encodeFrame(FrameType.started, json({ pid: 7 })), ...frames]) socket.write(frame)
              }
              if ("late" in answer) setTimeout(() => say(answer.late), 150)
              else say(answer)
            }
            const first = greeting.subarray(greeting.indexOf("\n") + 1)
            if (first.length > 0) heard(first)
            else socket.once("data", heard)
          })
        })
        server.listen(vsock, () => resume(Effect.succeed(server)))
      }),
      (server) => Effect.sync(() => server.close())
    )
    const agent = yield* Agent
    return yield* use(agent.client(vsock), { calls: () => calls, requests, vsock })
  }).pipe(
    Effect.scoped,
    Effect.provide(
      Agent.layer.pipe(Layer.provide(Layer.mergeAll(Vsock.layer, NodeFileSystem.layer, Layer.mock(Assets, {}))))
    )
  )

const patient: ExecOptions = { connect: { timeout: "5 seconds", pause: "5 millis" } }

describe("execRaw", () => {
  const said = [out("a"), err("b"), out("c"), exit(0)]

  for (const keep of [[], ["stdout"], ["stderr"], ["stdout", "stderr"]] as const) {
    it.live(`keeps ${keep.join(" and ") || "nothing"}, and shows every piece in order`, () =>
      withAgent([said], (client) =>
        Effect.gen(function* () {
          const pieces: Array<string> = []
          const onOutput: ExecOptions["onOutput"] = ({ bytes, channel }) =>
            Effect.sync(() => void pieces.push(`${channel} ${text(bytes)}`))
          const { stderr, stdout } = yield* client.execRaw("x", { keep, onOutput })
          assert.deepStrictEqual(pieces, ["stdout a", "stderr b", "stdout c"])
          const all: ReadonlyArray<string> = keep
          assert.strictEqual(text(stdout), all.includes("stdout") ? "ac" : "")
          assert.strictEqual(text(stderr), all.includes("stderr") ? "b" : "")
        })
      )
    )
  }

  it.live("tells the end of a failed command's stderr, kept or not", () =>
    withAgent([[err(`${"x".repeat(64 * 1024)}why`), exit(3)]], (client) =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(client.exec("x", { keep: [] }))
        assert.strictEqual(error.code, "EXEC_NONZERO_EXIT")
        assert.isTrue(error.message.endsWith("xwhy"))
        assert.isBelow(error.message.length, 65 * 1024)
      })
    )
  )

  it.live("keeps no more than it may, and says what to do", () =>
    withAgent([[out("a".repeat(1000)), err("b".repeat(1000)), exit(0)]], (client) =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(client.execRaw("x", { maxOutputBytes: 1999 }))
        assert.strictEqual(error.code, "EXEC_OUTPUT_TOO_LARGE")
        assert.include(error.hint, "vm.start")
        assert.strictEqual((yield* client.execRaw("x", { maxOutputBytes: 2000 })).stdout.length, 1000)
        assert.strictEqual((yield* client.execRaw("x", { maxOutputBytes: 1000, keep: ["stderr"] })).stderr.length, 1000)
      })
    )
  )

  it.live("tries an unreachable guest again, if it may", () =>
    withAgent(["hang up", "hang up", said], (client, { calls }) =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(client.execRaw("x"))
        assert.deepStrictEqual([error.code, error.retryable, calls()], ["EXEC_AGENT_UNAVAILABLE", true, 1])
        assert.strictEqual(text((yield* client.execRaw("x", patient)).stdout), "ac")
        assert.strictEqual(calls(), 3)
      })
    )
  )

  it.live("never tries again what has started", () =>
    withAgent([[out("a")]], (client, { calls }) =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(client.execRaw("x", { ...patient, timeout: "100 millis" }))
        assert.deepStrictEqual([error.code, calls()], ["EXEC_AGENT_TIMEOUT", 1])
      })
    )
  )

  it.live("gives up a guest that does not take the command in time", () =>
    withAgent(["say nothing"], (client, { calls }) =>
      Effect.gen(function* () {
        const connect = { timeout: "50 millis", pause: "5 millis" } as const
        const error = yield* Effect.flip(client.execRaw("x", { connect }))
        assert.deepStrictEqual([error.code, calls()], ["EXEC_AGENT_UNAVAILABLE", 1])
      })
    )
  )

  it.live("does not wait for a VM that is gone", () =>
    withAgent([said], (client, { vsock }) =>
      Effect.gen(function* () {
        rmSync(vsock)
        const began = performance.now()
        const error = yield* Effect.flip(client.execRaw("x", patient))
        assert.strictEqual(error.code, "EXEC_AGENT_UNAVAILABLE")
        assert.isBelow(performance.now() - began, 2000)
      })
    )
  )
})

describe("a copy's clock", () => {
  const done = [encodeFrame(FrameType.end, json({ renewed: ["random", "clock"], kept: [], clockStepMs: 5 }))]
  const identity = { hostname: "copy", generation: "1", env: {} }

  it.live("is set again when the time was long under way", () =>
    withAgent([{ late: done }, done], (client, { requests }) =>
      Effect.gen(function* () {
        assert.strictEqual((yield* client.rejuvenate(identity)).clockStepMs, 5)
        const [first, second] = requests
        assert.deepStrictEqual([first?.op, second?.op], ["rejuvenate", "clock"])
        assert.isAtLeast((second?.nowMs ?? 0) - (first?.nowMs ?? 0), 140)
      })
    )
  )

  it.live("is not set for ever on a host that is never quick", () =>
    withAgent([{ late: done }], (client, { requests }) =>
      Effect.gen(function* () {
        yield* client.rejuvenate(identity)
        assert.deepStrictEqual(
          requests.map(({ op }) => op),
          ["rejuvenate", "clock", "clock", "clock"]
        )
      })
    )
  )
})

const collected = (output: RunningCommand["output"]) =>
  Effect.map(Stream.runCollect(output), (pieces) =>
    Chunk.join(
      Chunk.map(pieces, ({ bytes }) => text(bytes)),
      ""
    )
  )

describe("a running command", () => {
  const large = Array.from({ length: 40 }, (_, n) => out(String(n % 10).repeat(50_000)))

  it.live("reports how it ended even when its output is not read", () =>
    withAgent([[...large, exit(3)]], (client) =>
      Effect.gen(function* () {
        const running = yield* client.start("x")
        assert.strictEqual((yield* running.exit).code, 3)
        // what was kept, and that it is not all
        const error = yield* Effect.flip(collected(running.output))
        assert.strictEqual(error.code, "EXEC_OUTPUT_TOO_LARGE")
      }).pipe(Effect.scoped, Effect.timeout("5 seconds"))
    )
  )

  it.live("of an agent whose credit is no number fails, and a flood of it is read through", () => {
    const credit = encodeFrame(FrameType.credit, Buffer.from([0, 0, 0, 1]))
    const flood = Buffer.concat(Array.from({ length: 50_000 }, () => credit))
    return Effect.gen(function* () {
      const codeOf = (said: ReadonlyArray<Uint8Array>) =>
        withAgent([said], (client) =>
          Effect.either(Effect.scoped(Effect.flatMap(client.start("x"), ({ exit }) => exit)))
        )
      const broken = yield* codeOf([encodeFrame(FrameType.credit, Buffer.from([1])), exit(0)])
      assert.strictEqual(broken._tag === "Left" ? broken.left.code : "it went on", "EXEC_PROTOCOL")
      const flooded = yield* codeOf([flood, exit(4)])
      assert.strictEqual(flooded._tag === "Right" ? flooded.right.code : flooded.left.message, 4)
    }).pipe(Effect.timeout("20 seconds"))
  })

  it.live("has its output for a reader that begins after its end was asked for", () =>
    withAgent([[out("a"), err("b"), out("c"), exit(0)]], (client) =>
      Effect.gen(function* () {
        const after = yield* client.start("x")
        assert.strictEqual((yield* after.exit).code, 0)
        assert.strictEqual(yield* collected(after.output), "abc")
        const beside = yield* client.start("x")
        const [exited, said] = yield* Effect.all([beside.exit, collected(beside.output)], { concurrency: 2 })
        assert.deepStrictEqual([exited.code, said], [0, "abc"])
      }).pipe(Effect.scoped, Effect.timeout("5 seconds"))
    )
  )

  it.live("loses nothing to the wait for its end while somebody reads", () =>
    withAgent([[...large, exit(0)]], (client) =>
      Effect.gen(function* () {
        const running = yield* client.start("x")
        const reading = yield* Effect.fork(
          Stream.runFoldEffect(running.output, 0, (sum, { bytes }) =>
            Effect.as(Effect.sleep("1 millis"), sum + bytes.length)
          )
        )
        yield* Effect.sleep("20 millis")
        assert.strictEqual((yield* running.exit).code, 0)
        assert.strictEqual(yield* Fiber.join(reading), 2_000_000)
      }).pipe(Effect.scoped, Effect.timeout("10 seconds"))
    )
  )

  it.live("tells how it ended also when a reader has left half-way", () =>
    withAgent([[...large, exit(4)]], (client) =>
      Effect.gen(function* () {
        const running = yield* client.start("x")
        yield* Stream.runDrain(Stream.take(running.output, 1))
        assert.strictEqual((yield* running.exit).code, 4)
      }).pipe(Effect.scoped, Effect.timeout("5 seconds"))
    )
  )
})

describe("files", () => {
  const data = (content: string) => encodeFrame(FrameType.data, Buffer.from(content))
  const entry = (name: string) =>
    `${JSON.stringify({ name, kind: "file", size: 0, mode: 420, mtimeMs: 0, uid: 0, gid: 0 })}\n`
  const end = [encodeFrame(FrameType.eof, Buffer.alloc(0)), encodeFrame(FrameType.end, json({ entries: 1 }))]

  it.live("have names of any bytes, which can be asked for as they were told", () =>
    withAgent([[data(entry("a\udcffb")), ...end]], (client, { requests }) =>
      Effect.gen(function* () {
        const [listed] = yield* client.list("/srv")
        assert.strictEqual(listed?.name, "a\udcffb")
        yield* Effect.ignore(client.remove(`/srv/${listed?.name}`))
        assert.deepStrictEqual([requests.at(-1)?.op, requests.at(-1)?.path], ["remove", "/srv/a\udcffb"])
      })
    )
  )

  const nonsense: ReadonlyArray<readonly [what: string, said: ReadonlyArray<Uint8Array>, code: string]> = [
    ["a line without an end", [data("x".repeat(70_000)), ...end], "FILES_PROTOCOL"],
    ["a line that is too long", [data(entry("x".repeat(70_000))), ...end], "FILES_PROTOCOL"],
    ["what is no entry", [data("{}\n"), ...end], "FILES_PROTOCOL"],
    ["no frame", [Buffer.alloc(64, 0xff)], "FILES_PROTOCOL"]
  ]
  for (const [what, said, code] of nonsense) {
    it.live(`of an agent that says ${what} are an error of the protocol`, () =>
      withAgent([said], (client) =>
        Effect.gen(function* () {
          assert.strictEqual((yield* Effect.flip(client.list("/srv"))).code, code)
        })
      )
    )
  }

  it.live("of an agent that hangs up are an unreachable agent's", () =>
    withAgent(["hang up"], (client) =>
      Effect.gen(function* () {
        assert.strictEqual((yield* Effect.flip(client.list("/srv"))).code, "FILES_AGENT_UNAVAILABLE")
        assert.strictEqual((yield* Effect.flip(client.stat("/srv"))).code, "FILES_AGENT_UNAVAILABLE")
      })
    )
  )
})
