import type { CommandExecutor } from "@effect/platform"
import { Data, Effect } from "effect"
import * as command from "./command.ts"

/** A host program that could not be started. */
export class ToolMissing extends Data.TaggedError("ToolMissing")<{ readonly tool: string; readonly cause: unknown }> {
  override get message() {
    return `${this.tool} cannot be run`
  }
}

/** A host program that ended with another code than 0. The caller turns this into an error that says what could not be done. */
export class ToolFailed extends Data.TaggedError("ToolFailed")<{
  readonly tool: string
  readonly code: number
  readonly stderr: string
}> {
  override get message() {
    return `${this.tool} ended with code ${this.code}: ${this.stderr.trim().split("\n").slice(-3).join("; ")}`
  }
}

export type ToolError = ToolMissing | ToolFailed

/** The exit code of a shell, or of a program that starts another, when there is no such program. */
const notFound = 127

/**
 * Runs a host program to its end, with LC_ALL=C, and returns its stdout. `tool` is its name in errors, for a program that is started by way of
 * another. Fails with ToolMissing or ToolFailed. Interruption ends the program.
 */
export const run = (
  argv: readonly [string, ...ReadonlyArray<string>],
  options: { readonly env?: Readonly<Record<string, string>>; readonly tool?: string } = {}
): Effect.Effect<string, ToolError, CommandExecutor.CommandExecutor> => {
  const tool = options.tool ?? argv[0]
  return command.run(argv, { LC_ALL: "C", ...options.env }).pipe(
    Effect.mapError((cause) => new ToolMissing({ tool, cause })),
    Effect.flatMap(({ code, stderr, stdout }) =>
      code === 0
        ? Effect.succeed(stdout)
        : Effect.fail(
            code === notFound
              ? new ToolMissing({ tool, cause: new Error(stderr.trim()) })
              : new ToolFailed({ tool, code, stderr })
          )
    )
  )
}
