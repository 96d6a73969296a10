import { statSync } from "node:fs"
import { Cause, Effect, Exit, Fiber, Option, Schedule } from "effect"
import { FilesError, type SecretsError } from "../errors.ts"
import { Agent, type AgentClient } from "../guest/Agent.ts"
import * as layers from "../runtime/layers.ts"

export interface VsockSecretsOptions {
  /** Milliseconds for which an unreachable agent is tried. Default 10 000. */
  readonly timeoutMs?: number
  /** Milliseconds between two attempts. Default 250. */
  readonly retryMs?: number
}

export interface VsockFilesOptions {
  /** Milliseconds for which an unreachable agent is tried. Default 5000. */
  readonly timeoutMs?: number
  /** Milliseconds between two attempts. Default 250. */
  readonly retryMs?: number
  /** fnmatch(3) patterns for the path below the directory, or, without a slash, for any name. */
  readonly excludes?: ReadonlyArray<string>
}

/** Runs an effect on the agent behind a VM's socket. Tries again while the agent may be reached later. */
const withAgent = async <A, E extends FilesError | SecretsError>(
  udsPath: string,
  { retryMs = 250, timeoutMs }: { readonly retryMs?: number | undefined; readonly timeoutMs: number },
  use: (client: AgentClient) => Effect.Effect<A, E>
): Promise<A> => {
  const lastly = Effect.delay(Effect.succeed("late" as const), timeoutMs)
  const program = Effect.gen(function* () {
    const client = (yield* Agent).client(udsPath)
    const deadline = yield* Effect.fork(lastly)
    const isLate = Effect.map(Fiber.poll(deadline), Option.isSome)
    return yield* Effect.retry(use(client), {
      while: (error) => Effect.map(isLate, (late) => error.retryable && !late),
      schedule: Schedule.spaced(retryMs)
    })
  })
  const exit = await Effect.runPromiseExit(Effect.provide(program, layers.agent))
  if (Exit.isSuccess(exit)) return exit.value
  throw Cause.originalError(Cause.squash(exit.cause))
}

const isDirectory = (hostDir: string): Effect.Effect<void, FilesError> =>
  statSync(hostDir, { throwIfNoEntry: false })?.isDirectory() === true
    ? Effect.void
    : new FilesError({
        code: "FILES_HOST_DIR_NOT_FOUND",
        message: `${hostDir} is not a directory of this host`,
        hint: "name one that is there"
      })

const filesDefaults = ({ retryMs, timeoutMs = 5000 }: VsockFilesOptions) => ({ retryMs, timeoutMs })

/** Copies trees to and from a guest, by the VM's socket (`vsock.sock` in its directory). Rejects with FilesError. */
export const VsockFiles = {
  /** Copies a directory's contents into a guest directory, which is made if missing. Existing files are replaced. */
  push: (udsPath: string, hostDir: string, guestPath: string, options: VsockFilesOptions = {}): Promise<void> =>
    withAgent(udsPath, filesDefaults(options), (client) =>
      Effect.suspend(() => isDirectory(hostDir)).pipe(
        Effect.zipRight(client.push(hostDir, guestPath, { excludes: options.excludes ?? [] }))
      )
    ),
  /** Copies from the guest to the host in the same way. */
  pull: (udsPath: string, guestPath: string, hostDir: string, options: VsockFilesOptions = {}): Promise<void> =>
    withAgent(udsPath, filesDefaults(options), (client) =>
      client.pull(guestPath, hostDir, { excludes: options.excludes ?? [] })
    )
}

/** Secrets of a guest, by the VM's socket (`vsock.sock` in its directory). */
export const VsockSecrets = {
  /** Sends a guest secrets, which commands get when they name them. A value with a newline rejects with SECRETS_VALUE_INVALID; nothing is sent. */
  send: (
    udsPath: string,
    secrets: Readonly<Record<string, string>>,
    { retryMs, timeoutMs = 10_000 }: VsockSecretsOptions = {}
  ): Promise<void> => withAgent(udsPath, { retryMs, timeoutMs }, (client) => Effect.asVoid(client.secrets(secrets)))
}
