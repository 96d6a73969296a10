import { Either, LogLevel } from "effect"
import { ParseError } from "../errors.ts"

/** The command line, divided before the option parser sees it. */
export interface Invocation {
  /** The paths of Node and of the CLI. */
  readonly program: ReadonlyArray<string>
  readonly verb: string
  /** The arguments between the verb and the first `--`. */
  readonly args: ReadonlyArray<string>
  /** The arguments behind the first `--`: a guest's command, which the option parser must not change. */
  readonly tail: ReadonlyArray<string>
  /** Logs from this level on are shown on stderr. Default: warnings. */
  readonly logLevel: Either.Either<LogLevel.LogLevel, ParseError>
}

const levels: Readonly<Record<string, LogLevel.LogLevel>> = {
  all: LogLevel.All,
  trace: LogLevel.Trace,
  debug: LogLevel.Debug,
  info: LogLevel.Info,
  warning: LogLevel.Warning,
  error: LogLevel.Error,
  fatal: LogLevel.Fatal,
  none: LogLevel.None
}

const levelOf = (name: string | undefined): Invocation["logLevel"] => {
  const level = levels[name ?? ""]
  return level === undefined
    ? Either.left(
        new ParseError({
          code: name === undefined ? "PARSE_FLAG_MISSING_VALUE" : "PARSE_FLAG_MALFORMED",
          message: name === undefined ? "--log-level needs a value" : `--log-level ${JSON.stringify(name)} is no level`,
          hint: `one of ${Object.keys(levels).join(", ")}`
        })
      )
    : Either.right(level)
}

export const of = (argv: ReadonlyArray<string>): Invocation => {
  const at = argv.indexOf("--")
  const [head, tail] = at === -1 ? [argv, []] : [argv.slice(0, at), argv.slice(at + 1)]
  const flag = head.findIndex((arg) => arg === "--log-level" || arg.startsWith("--log-level="))
  const isApart = head[flag] === "--log-level"
  const own = flag === -1 ? head : head.filter((_, i) => i !== flag && !(isApart && i === flag + 1))
  const [, , verb = "", ...args] = own
  return {
    program: own.slice(0, 2),
    verb,
    args,
    tail,
    logLevel:
      flag === -1
        ? Either.right(LogLevel.Warning)
        : levelOf(isApart ? head[flag + 1] : head[flag]?.slice("--log-level=".length))
  }
}
