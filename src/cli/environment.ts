import { ConfigError } from "effect"
import { ParseError } from "../errors.ts"

const reasons = (error: ConfigError.ConfigError): ReadonlyArray<string> =>
  error._op === "And" || error._op === "Or"
    ? [...reasons(error.left), ...reasons(error.right)]
    : [`${error.path.join("_")}: ${error.message}`]

/** Turns the error of a wrong environment variable into a ParseError, because it is a mistake of usage like a wrong option. */
export const unusable = <E>(error: E): Exclude<E, ConfigError.ConfigError> | ParseError =>
  ConfigError.isConfigError(error)
    ? new ParseError({
        code: "PARSE_ENVIRONMENT_INVALID",
        message: `the environment has a setting that cannot be used: ${reasons(error).join("; ")}`,
        hint: 'a time is written "60 seconds"; README.md lists the MACHINEN_* variables and what they take'
      })
    : (error as Exclude<E, ConfigError.ConfigError>)
