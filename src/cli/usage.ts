import * as HelpDoc from "@effect/cli/HelpDoc"
import type { Usage } from "@effect/cli/Usage"
import type * as ValidationError from "@effect/cli/ValidationError"
import { Effect, Option } from "effect"
import { ParseError } from "../errors.ts"

export interface Flag {
  /** The option's names with their dashes; messages show the first. */
  readonly names: ReadonlyArray<string>
  readonly takesValue: boolean
  readonly repeatable: boolean
}

/** The options in a command's usage. */
export const flagsOf = (usage: Usage, repeatable = false): ReadonlyArray<Flag> => {
  switch (usage._tag) {
    case "Named":
      return usage.names.some((name) => name.startsWith("-"))
        ? [{ names: usage.names, takesValue: Option.isSome(usage.acceptedValues), repeatable }]
        : []
    case "Optional":
      return flagsOf(usage.usage, repeatable)
    case "Repeated":
      return flagsOf(usage.usage, true)
    case "Alternation":
    case "Concat":
      return [...flagsOf(usage.left, repeatable), ...flagsOf(usage.right, repeatable)]
    default:
      return []
  }
}

/** Options of every verb. */
const builtIn: ReadonlyArray<Flag> = [
  { names: ["--help", "-h"], takesValue: false, repeatable: true },
  { names: ["--version"], takesValue: false, repeatable: true },
  { names: ["--wizard"], takesValue: false, repeatable: true },
  { names: ["--completions"], takesValue: true, repeatable: false }
]

const goesAfter = "`--help` shows the options; an option of the guest's command goes after `--`"

const unknown = (name: string, part: string, flags: ReadonlyArray<Flag>) => {
  const close = flags.flatMap(({ names }) => names).find((other) => name.length > 3 && other.startsWith(name))
  return new ParseError({
    code: "PARSE_FLAG_UNKNOWN",
    message: `there is no option ${name}${part === name ? "" : ` (in ${part})`}`,
    hint: close === undefined ? goesAfter : `there is ${close}; ${goesAfter}`
  })
}

/** Splits a cluster like `-it` into `-i -t`. Only the last option may take a value, which is the next argument. */
const splitCluster = (
  part: string,
  flags: ReadonlyArray<Flag>
): Effect.Effect<ReadonlyArray<readonly [name: string, flag: Flag]>, ParseError> =>
  Effect.forEach([...part.slice(1)], (letter, at) => {
    const name = `-${letter}`
    const flag = flags.find(({ names }) => names.includes(name))
    if (flag === undefined) return unknown(name, part, flags)
    if (flag.takesValue && at + 2 < part.length) {
      return new ParseError({
        code: "PARSE_FLAG_MALFORMED",
        message: `${name} in ${part} takes a value`,
        hint: `write it apart: ${name} VALUE`
      })
    }
    return Effect.succeed([name, flag] as const)
  })

/**
 * Prepares arguments for @effect/cli: splits clusters of short options, and values from their options. Refuses what @effect/cli would let pass: it
 * drops clusters that it does not know, and takes other unknown options, options without their value, and repeated ones for arguments. `args` are
 * the arguments between the verb and the guest's command. Fails with ParseError.
 */
export const normalize = Effect.fnUntraced(function* (own: ReadonlyArray<Flag>, args: ReadonlyArray<string>) {
  const flags = [...own, ...builtIn]
  const isFlag = (arg: string) => flags.some(({ names }) => names.includes(arg.split("=", 1)[0] ?? ""))
  const seen = new Set<Flag>()
  const normal: Array<string> = []
  for (let at = 0; at < args.length; at++) {
    const arg = args[at] ?? ""
    if (!arg.startsWith("-") || arg === "-") {
      normal.push(arg)
      continue
    }
    if (arg === "--help" || arg === "-h") return [...normal, ...args.slice(at)]
    const isLong = arg.startsWith("--")
    const equals = isLong ? arg.indexOf("=") : -1
    const long = equals === -1 ? arg : arg.slice(0, equals)
    const flag = flags.find(({ names }) => names.includes(long))
    if (isLong && flag === undefined) return yield* unknown(long, long, flags)
    const given = flag === undefined ? yield* splitCluster(arg, flags) : [[long, flag] as const]
    for (const [name, flag] of given) {
      if (seen.has(flag) && flag.takesValue && !flag.repeatable) {
        return yield* new ParseError({
          code: "PARSE_FLAG_DUPLICATE",
          message: `${name} is given more than once`,
          hint: "give it once"
        })
      }
      // a repeated switch changes nothing, and @effect/cli would take it for an argument
      if (!seen.has(flag) || flag.takesValue) normal.push(flag.takesValue || equals === -1 ? name : arg)
      seen.add(flag)
      if (!flag.takesValue) continue
      const value = equals === -1 ? args[++at] : arg.slice(equals + 1)
      if (value === undefined || (equals === -1 && isFlag(value))) {
        return yield* new ParseError({
          code: "PARSE_FLAG_MISSING_VALUE",
          message: `${name} needs a value`,
          hint: isLong
            ? `if ${value ?? "it"} is to be it: ${name}=${value ?? "VALUE"}`
            : `write it behind: ${name} VALUE`
        })
      }
      normal.push(value)
    }
  }
  return normal
})

/** The code of an error of @effect/cli, by its kind and its text. */
export const codeOf = (error: ValidationError.ValidationError): ParseError["code"] => {
  const text = HelpDoc.toAnsiText(error.error)
  if (/unknown argument: '-/.test(text)) return "PARSE_FLAG_UNKNOWN"
  switch (error._tag) {
    case "CorrectedFlag":
    case "UnclusteredFlag":
      return "PARSE_FLAG_UNKNOWN"
    case "MultipleValuesDetected":
      return "PARSE_FLAG_DUPLICATE"
    case "CommandMismatch":
    case "NoBuiltInMatch":
      return "PARSE_COMMAND_UNKNOWN"
    case "MissingSubcommand":
    case "MissingFlag":
    case "MissingValue":
      return "PARSE_ARGUMENT_MISSING"
    default:
      if (/unknown argument/.test(text)) return "PARSE_ARGUMENT_UNKNOWN"
      return /subcommand/.test(text) ? "PARSE_COMMAND_UNKNOWN" : "PARSE_FLAG_MALFORMED"
  }
}
