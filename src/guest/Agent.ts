import { FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option, Schema, type Scope, Stream } from "effect"
import { ExecError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import type { ExitRecord } from "../machine/ShimPlan.ts"
import { boundedLines } from "../platform/boundedLines.ts"
import { protocolError, toExecError, unavailable } from "./agentErrors.ts"
import * as Exec from "./Exec.ts"
import * as Files from "./Files.ts"
import * as FileTree from "./FileTree.ts"
import * as GuestSystem from "./GuestSystem.ts"
import * as operation from "./operation.ts"
import * as SecretStore from "./SecretStore.ts"
import * as Standstill from "./Standstill.ts"
import * as Terminal from "./Terminal.ts"
import * as Tunnel from "./Tunnel.ts"
import { Vsock } from "./Vsock.ts"

/** The host port that the agent dials when it can serve. */
const doorbellPort = 1979

/** The operations of one guest's agent. */
export interface AgentClient
  extends Exec.Exec,
    Files.Files,
    FileTree.FileTree,
    Terminal.TerminalClient,
    Tunnel.Tunnels,
    SecretStore.SecretStore,
    GuestSystem.GuestSystem,
    Standstill.Standstill {}

/**
 * Runs commands in guests and copies files, over the private channel. The agent's client knows a VM by its vsock socket only, not by the
 * registry.
 */
export class Agent extends Context.Tag("machinen/Agent")<
  Agent,
  {
    /** The client of one guest. `exited` completes at the VM's end, which then explains a broken connection. Default: never. */
    readonly client: (vsockPath: string, exited?: Effect.Effect<ExitRecord, unknown>) => AgentClient
    /**
     * Listens for the guest's doorbell. The inner effect waits for it and answers with the time; it fails with EXEC_PROTOCOL or
     * EXEC_AGENT_UNAVAILABLE. Closing the scope ends the listening.
     */
    readonly doorbell: (vsockPath: string) => Effect.Effect<Effect.Effect<void, ExecError>, ExecError, Scope.Scope>
  }
>() {
  static readonly layer = Layer.effect(
    Agent,
    Effect.gen(function* () {
      const vsock = yield* Vsock
      const fs = yield* FileSystem.FileSystem
      const { shim } = yield* Assets

      const doorbell = Effect.fn("Agent.doorbell")(function* (vsockPath: string) {
        const accept = yield* Effect.mapError(vsock.listen(vsockPath, doorbellPort), unavailable)
        return Effect.gen(function* () {
          const connection = yield* Effect.mapError(accept, unavailable)
          const line = yield* connection.bytes.pipe(
            boundedLines(maxHello, () => new Error("a line without an end")),
            Stream.runHead,
            Effect.mapError(unavailable)
          )
          if (Option.isNone(line)) return yield* protocolError("the guest hung up at the doorbell")
          const { version } = yield* Effect.mapError(decodeHello(line.value), () =>
            protocolError(`the guest rang with ${JSON.stringify(line.value.slice(0, 200))}`)
          )
          if (version !== 1) {
            return yield* new ExecError({
              code: "EXEC_PROTOCOL",
              message: `the guest agent speaks protocol ${version}, this host speaks 1`,
              hint: "run `machinen install`: kernel and guest binary must come from the same release"
            })
          }
          // The guest's end is not waited for: later requests come after this answer on the same channel.
          yield* Effect.ignore(connection.write(Buffer.from(`${JSON.stringify({ nowMs: Date.now() })}\n`)))
          yield* connection.end
        }).pipe(Effect.scoped)
      })

      return Agent.of({
        doorbell,
        client: (vsockPath, exited = Effect.never) => makeClient(operation.make(vsock, vsockPath, exited), fs, shim)
      })
    })
  )
}

/** Longest line at the doorbell, in characters. */
const maxHello = 4096

const decodeHello = Schema.decode(Schema.parseJson(Schema.Struct({ version: Schema.Int })))

const makeClient = (
  operations: operation.Operations,
  fs: FileSystem.FileSystem,
  archiver: Assets["Type"]["shim"]
): AgentClient => {
  const { ask, operate } = operations
  return {
    ...Terminal.make({
      open: (request) =>
        Effect.map(Effect.mapError(operate(request), toExecError), ({ frames, result, send, sendInput, started }) => ({
          pid: started.pid ?? 0,
          frames: Stream.mapError(frames, toExecError),
          result: Effect.mapError(result, toExecError),
          send,
          sendInput
        })),
      ask: (request) => Effect.mapError(ask(request), toExecError)
    }),
    ...Tunnel.make(operations),
    ...SecretStore.make(operations),
    ...FileTree.make(operations),
    ...Exec.make(operations),
    ...Files.make(operations, fs, archiver),
    ...GuestSystem.make(operations),
    ...Standstill.make(operations)
  }
}
