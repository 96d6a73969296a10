import * as ValidationError from "@effect/cli/ValidationError"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { Cause, Console, Effect, Exit, Fiber, Layer, Option } from "effect"
import { ExecError, isMachinenError, ParseError, render } from "../errors.ts"
import { printable } from "../platform/printable.ts"
import * as debug from "../runtime/debug.ts"
import * as layers from "../runtime/layers.ts"
import { cli } from "./app.ts"
import { argumentsAreText } from "./argumentBytes.ts"
import { startFailure } from "./commands/run.ts"
import { unusable } from "./environment.ts"
import { ExitWith } from "./exit.ts"
import * as Invocation from "./invocation.ts"
import * as signals from "./signals.ts"
import * as stdio from "./stdio.ts"
import * as usage from "./usage.ts"

const invocation = Invocation.of(process.argv)
const { verb } = invocation

/** Verbs that exit with the guest command's code use docker's 125 for a failure of the CLI itself. */
const relaysExitCode = ["run", "exec", "boot", "attach"].includes(verb)
const ourFailure = relaysExitCode ? 125 : 1
const badUsage = relaysExitCode ? 125 : 2

/** The signal that ended this process, if one did. */
let endedBy: signals.Forwarded | undefined

/**
 * Exit codes: 0 success, 1 an expected failure (125 where 1 could be the guest command's), 2 wrong usage (or 125), 70 a bug of machinen, 124 a
 * time limit, 128 + signal when a signal ended this process, also SIGPIPE when the output's reader has gone.
 */
const exitCode = (exit: Exit.Exit<unknown, unknown>): number => {
  if (Exit.isSuccess(exit)) return 0
  const unwritten = stdio.outputErrorOf(exit.cause)
  if (unwritten !== undefined) return unwritten.readerHasLeft ? 141 : ourFailure
  if (Cause.isInterruptedOnly(exit.cause)) return 128 + signals.signalNumber(endedBy ?? "SIGINT")
  const failure = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (failure instanceof ExitWith) return failure.code
  if (failure instanceof ExecError && relaysExitCode) return startFailure(failure)
  if (ValidationError.isValidationError(failure) || failure instanceof ParseError) return badUsage
  return isMachinenError(failure) ? ourFailure : 70
}

const report = (cause: Cause.Cause<unknown>): Effect.Effect<void> => {
  const unwritten = stdio.outputErrorOf(cause)
  if (unwritten !== undefined) {
    return unwritten.readerHasLeft
      ? Effect.void
      : Console.error(
          `machinen: (OUTPUT_FAILED): ${unwritten.message}\n  hint: write to another file, or make room there`
        )
  }
  if (Cause.isInterruptedOnly(cause)) return Effect.void
  const failure = Option.getOrUndefined(Cause.failureOption(cause))
  if (failure instanceof ExitWith) return Effect.void
  if (ValidationError.isValidationError(failure)) {
    if (ValidationError.isHelpRequested(failure)) return Effect.void
    // @effect/cli has already printed what is wrong
    const code = usage.codeOf(failure)
    const command = code === "PARSE_COMMAND_UNKNOWN" ? "machinen" : `machinen ${verb}`
    return Console.error(`machinen: (${code})\n  hint: \`${command} --help\` shows what it takes`)
  }
  if (isMachinenError(failure)) return Console.error(`machinen: ${render(failure)}`)
  return Console.error(printable(Cause.pretty(cause, { renderErrorCause: true }), { lines: true }))
}

/** Every verb first removes what dead VMs left, except `gc`, which reports it. */
const services = Layer.mapError(verb === "gc" ? layers.layerWithoutReconcile : layers.layer, unusable)

const fiber = argumentsAreText(process.argv).pipe(
  Effect.zipRight(cli(invocation, services)),
  Effect.provide(NodeContext.layer),
  Effect.tapErrorCause((cause) => Effect.catchAllCause(report(cause), () => Effect.void)),
  stdio.withConsole,
  Effect.withUnhandledErrorLogLevel(Option.none()),
  Effect.provide(debug.layer),
  Effect.runFork
)

// Signals end the program through its scopes. A second signal does not hurry them, because every release has a time limit of its own.
signals.install((signal) => {
  endedBy ??= signal
  Effect.runFork(Fiber.interruptAsFork(fiber, fiber.id()))
})

fiber.addObserver((exit) => {
  Effect.runFork(stdio.flush).addObserver(() => process.exit(exitCode(exit)))
})
