import { statSync } from "node:fs"
import { Cause, Effect, Exit, Fiber, Option, Schedule } from "effect"
import { FilesError, type SecretsError } from "../errors.ts"
import { Agent, type AgentClient } from "../guest/Agent.ts"
import * as layers from "../runtime/layers.ts"

export interface VsockSecretsOptions {
  /** How long an agent that cannot be reached is tried. Default 10 000. */
  readonly timeoutMs?: number
  /** The pause between two tries. Default 250. */
  readonly retryMs?: number
}

export interface VsockFilesOptions {
  /** How long an agent that cannot be reached is tried. Default 5000. */
  readonly timeoutMs?: number
  /** The pause between two tries. Default 250. */
  readonly retryMs?: number
  /** fnmatch(3) patterns, for the path below the directory or for any name. */
  readonly excludes?: ReadonlyArray<string>
}

/** Runs an effect on the agent behind a VM's socket, and again as long as that may help. */
const onAgent = async <A, E extends FilesError | SecretsError>(
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

/** Trees into and out of a guest, by the VM's socket (`vsock.sock` in its directory). */
export const VsockFiles = {
  /** A directory's contents into a guest directory, made if missing; existing files are replaced. */
  push: (udsPath: string, hostDir: string, guestPath: string, options: VsockFilesOptions = {}): Promise<void> =>
    onAgent(udsPath, filesDefaults(options), (client) =>
      Effect.suspend(() => isDirectory(hostDir)).pipe(
        Effect.zipRight(client.push(hostDir, guestPath, { excludes: options.excludes ?? [] }))
      )
    ),
  /** The other way round. */
  pull: (udsPath: string, guestPath: string, hostDir: string, options: VsockFilesOptions = {}): Promise<void> =>
    onAgent(udsPath, filesDefaults(options), (client) =>
      client.pull(guestPath, hostDir, { excludes: options.excludes ?? [] })
    )
}

export const VsockSecrets = {
  /** Gives a guest secrets, which commands get that name them. A value with a newline: SECRETS_VALUE_INVALID, and nothing is sent. */
  send: (
    udsPath: string,
    secrets: Readonly<Record<string, string>>,
    { retryMs, timeoutMs = 10_000 }: VsockSecretsOptions = {}
  ): Promise<void> => onAgent(udsPath, { retryMs, timeoutMs }, (client) => Effect.asVoid(client.secrets(secrets)))
}
