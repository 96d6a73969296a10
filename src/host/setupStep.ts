import { CommandExecutor } from "@effect/platform"
import { Effect, type Option } from "effect"
import { AssetError } from "../errors.ts"
import * as command from "../platform/command.ts"
import * as streamCommand from "../platform/streamCommand.ts"
import type { AssetName } from "./Assets.ts"

export type StepId = "toolchain" | "packages" | AssetName

/** Takes a line that a step prints. */
export type OnLine = (line: string) => Effect.Effect<void>

/** One step of set-up. `run` is called when `check` says that its result is missing. */
export interface Step {
  readonly id: StepId
  readonly title: string
  readonly check: Effect.Effect<boolean, AssetError>
  readonly run: (onLine: OnLine) => Effect.Effect<void, AssetError>
}

/** Starts the programs that steps need. */
export interface StepTools {
  /** Runs a tool that answers at once; `None` when it cannot be started. */
  readonly quick: (argv: readonly [string, ...ReadonlyArray<string>]) => Effect.Effect<Option.Option<command.Finished>>
  /** Runs a tool that prints while it works; `what` completes "cannot ...". Fails when it ends with another code than 0. */
  readonly long: (
    what: string,
    argv: readonly [string, ...ReadonlyArray<string>],
    options: Parameters<typeof streamCommand.run>[1]
  ) => Effect.Effect<void, AssetError>
}

/** The tools, started by this executor. */
export const makeStepTools = (executor: CommandExecutor.CommandExecutor): StepTools => ({
  quick: (argv) =>
    command
      .run(argv, { LC_ALL: "C" })
      .pipe(Effect.provideService(CommandExecutor.CommandExecutor, executor), Effect.option),
  long: (what, argv, options) =>
    streamCommand.run(argv, options).pipe(
      Effect.provideService(CommandExecutor.CommandExecutor, executor),
      Effect.mapError((cause) => buildFailed(what, cause)),
      Effect.filterOrFail(
        ({ code }) => code === 0,
        ({ code, tail }) =>
          buildFailed(what, new Error([`${argv[0]} ended with code ${code}`, ...tail.slice(-15)].join("\n    ")))
      ),
      Effect.asVoid
    )
})

export const buildFailed = (what: string, cause: Error) =>
  new AssetError({
    code: "ASSET_BUILD_FAILED",
    message: `cannot ${what}`,
    hint: "what was finished is kept, run it again to go on",
    cause
  })
