import * as ValidationError from "@effect/cli/ValidationError"
import { Cause, Console, Effect, Exit, Fiber, Option } from "effect"
import { ExecError, isMachinenError, ParseError, render } from "../domain/errors.ts"
import * as debug from "../runtime/debug.ts"
import * as layers from "../runtime/layers.ts"
import { cli } from "./app.ts"
import { startFailure } from "./commands/run.ts"
import { ExitWith } from "./exit.ts"
import * as signals from "./signals.ts"
import * as stdio from "./stdio.ts"
import * as usage from "./usage.ts"

/** Verbs whose exit code is the guest command's keep docker's 125 for a failure of our own. */
const relaysExitCode = ["run", "exec", "boot", "attach"].includes(process.argv[2] ?? "")

/** 0 fine, 1 an expected failure (125 where 1 could be the guest command's), 2 bad usage, 70 a bug of ours, 130 interrupted. */
const exitCode = (exit: Exit.Exit<unknown, unknown>): number => {
  if (Exit.isSuccess(exit)) return 0
  if (Cause.isInterruptedOnly(exit.cause)) return 130
  const failure = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (failure instanceof ExitWith) return failure.code
  if (failure instanceof ExecError && relaysExitCode) return startFailure(failure)
  if (ValidationError.isValidationError(failure) || failure instanceof ParseError) return relaysExitCode ? 125 : 2
  if (isMachinenError(failure)) return relaysExitCode ? 125 : 1
  return 70
}

const report = (cause: Cause.Cause<unknown>): Effect.Effect<void> => {
  if (Cause.isInterruptedOnly(cause)) return Effect.void
  const failure = Option.getOrUndefined(Cause.failureOption(cause))
  if (failure instanceof ExitWith) return Effect.void
  if (ValidationError.isValidationError(failure)) {
    if (ValidationError.isHelpRequested(failure)) return Effect.void
    // what is wrong has been printed by @effect/cli
    const code = usage.codeOf(failure)
    const command = code === "PARSE_COMMAND_UNKNOWN" ? "machinen" : `machinen ${process.argv[2] ?? ""}`
    return Console.error(`machinen: (${code})\n  hint: \`${command} --help\` shows what it takes`)
  }
  if (isMachinenError(failure)) return Console.error(`machinen: ${render(failure)}`)
  return Console.error(Cause.pretty(cause, { renderErrorCause: true }))
}

/** `gc` reports what it finds; every other verb begins by removing it. */
const services = process.argv[2] === "gc" ? layers.layerWithoutReconcile : layers.layer

const fiber = cli(process.argv).pipe(
  Effect.provide(services),
  Effect.tapErrorCause(report), // outside the layers, so that one that fails to build is reported too
  Effect.withUnhandledErrorLogLevel(Option.none()),
  Effect.provide(debug.layer),
  Effect.runFork
)

// ctrl-c and friends end the program through its scopes; a second one does not hurry them: every release has its own deadline
signals.install(() => Effect.runFork(Fiber.interruptAsFork(fiber, fiber.id())))

fiber.addObserver((exit) => {
  Effect.runFork(stdio.flush).addObserver(() => process.exit(exitCode(exit)))
})
