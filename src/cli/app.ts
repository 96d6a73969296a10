import { Command, CommandDescriptor } from "@effect/cli"
import { Effect, HashMap, type Layer, Option } from "effect"
import { ParseError } from "../errors.ts"
import * as debug from "../runtime/debug.ts"
import type * as layers from "../runtime/layers.ts"
import { version } from "../version.ts"
import { attach, sessionKill, sessions } from "./commands/attach.ts"
import { boot } from "./commands/boot.ts"
import { cp } from "./commands/cp.ts"
import { demo } from "./commands/demo.ts"
import { doctor } from "./commands/doctor.ts"
import { exec } from "./commands/exec.ts"
import { forward } from "./commands/forward.ts"
import { image } from "./commands/image.ts"
import { inspect } from "./commands/inspect.ts"
import { install } from "./commands/install.ts"
import { gc, pause, resume, stop } from "./commands/lifecycle.ts"
import { logs } from "./commands/logs.ts"
import { ls } from "./commands/ls.ts"
import { prepare } from "./commands/prepare.ts"
import { provision } from "./commands/provision.ts"
import { repl } from "./commands/repl.ts"
import { fork, restore } from "./commands/restore.ts"
import { run } from "./commands/run.ts"
import { bundle, snapshot } from "./commands/snapshot.ts"
import { watch } from "./commands/watch.ts"
import type { Invocation } from "./invocation.ts"
import * as usage from "./usage.ts"

type Descriptions = ReadonlyMap<string, HashMap.HashMap<string, CommandDescriptor.Command<unknown>>>

/** The command that the first words name, and how many words that are; `None` without words, and for a group of commands. */
const commandOf = (verbs: Descriptions, [verb = "", name = ""]: ReadonlyArray<string>) => {
  const unknown = (group: string, words: string) =>
    new ParseError({
      code: "PARSE_COMMAND_UNKNOWN",
      message: `there is no command ${words}`,
      hint: `\`${group} --help\` lists those there are`
    })
  const found = (depth: number, command: CommandDescriptor.Command<unknown>) =>
    Effect.succeedSome({ depth, flags: usage.flagsOf(CommandDescriptor.getUsage(command)) })
  if (verb === "" || verb.startsWith("-")) return Effect.succeedNone
  const commands = verbs.get(verb)
  if (commands === undefined) return unknown("machinen", verb)
  // `commands` of a command that is no group holds that command alone
  const own = HashMap.get(commands, verb)
  if (Option.isSome(own)) return found(1, own.value)
  if (name === "" || name.startsWith("-")) return Effect.succeedNone
  return Option.match(HashMap.get(commands, name), {
    onNone: () => unknown(`machinen ${verb}`, `${verb} ${name}`),
    onSome: (command) => found(2, command)
  })
}

/** The services that verbs use. */
export type Services = Layer.Layer.Success<typeof layers.layer>

/**
 * Turns a command line into an effect. The services are built only when a verb runs: help and usage need none, and tests provide fakes.
 */
export const cli = <E, R>(
  { args, logLevel, program, tail, verb }: Invocation,
  services: Layer.Layer<Services, E, R>
) => {
  const commands = [
    run(tail),
    boot(tail),
    exec(tail),
    attach(tail),
    sessions,
    sessionKill,
    repl,
    ls("ls"),
    ls("list"),
    ls("ps"),
    inspect,
    logs,
    cp,
    watch,
    forward,
    stop,
    pause,
    resume,
    ["inspect", "verify"].includes(args[0] ?? "") ? bundle : snapshot,
    restore,
    fork,
    image,
    prepare,
    provision("provision"),
    provision("bake"),
    gc,
    install,
    doctor,
    demo
  ] as const
  const root = Command.make("machinen").pipe(
    Command.withDescription("microVMs that boot in a fraction of a second, keep their state and never leak"),
    Command.withSubcommands(commands)
  )
  const verbs: Descriptions = new Map(
    commands.flatMap(({ descriptor }) =>
      [...CommandDescriptor.getNames<unknown>(descriptor)].map(
        (name) => [name, CommandDescriptor.getSubcommands<unknown>(descriptor)] as const
      )
    )
  )
  const words = verb === "" ? [] : [verb, ...args]
  return Effect.gen(function* () {
    const level = yield* logLevel
    const known = Option.getOrUndefined(yield* commandOf(verbs, words))
    const normal =
      known === undefined
        ? words
        : [...words.slice(0, known.depth), ...(yield* usage.normalize(known.flags, words.slice(known.depth)))]
    const provided = Command.provide(root, services)
    yield* Effect.locally(
      Command.run(provided, { name: "machinen", version })([...program, ...normal]),
      debug.shownFrom,
      level
    )
  })
}
