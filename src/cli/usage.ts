import * as HelpDoc from "@effect/cli/HelpDoc"
import type { Usage } from "@effect/cli/Usage"
import type * as ValidationError from "@effect/cli/ValidationError"
import { Effect, Option } from "effect"
import { ParseError } from "../domain/errors.ts"

interface Flag {
  /** With its dashes; the first is the one to show. */
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

/**
 * What @effect/cli would let pass: it takes an option without its value, and one that is given again, for an argument. `args` is what follows
 * the verb, up to the guest's command.
 */
export const check = (flags: ReadonlyArray<Flag>, args: ReadonlyArray<string>): Effect.Effect<void, ParseError> => {
  const seen = new Set<Flag>()
  for (let at = 0; at < args.length; at++) {
    const [name = "", inline] = (args[at] ?? "").split("=", 2)
    const flag = flags.find(({ names }) => names.includes(name))
    if (flag === undefined) continue
    if (seen.has(flag) && flag.takesValue && !flag.repeatable) {
      return new ParseError({
        code: "PARSE_FLAG_DUPLICATE",
        message: `${name} is given more than once`,
        hint: "give it once"
      })
    }
    seen.add(flag)
    if (!flag.takesValue || inline !== undefined) continue
    const value = args[++at]
    if (value === undefined || flags.some(({ names }) => names.includes(value.split("=", 1)[0] ?? ""))) {
      return new ParseError({
        code: "PARSE_FLAG_MISSING_VALUE",
        message: `${name} needs a value`,
        hint: `if ${value ?? "it"} is to be it: ${name}=${value ?? "VALUE"}`
      })
    }
  }
  return Effect.void
}

/** The code of what @effect/cli itself refuses, told by its kinds of errors and its words. */
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
