import { Options } from "@effect/cli"
import { FileSystem } from "@effect/platform"
import { Effect, Redacted } from "effect"
import { ParseError } from "../errors.ts"
import { isUtf8, variable } from "./argumentBytes.ts"

/** Names a secret, and never holds its value: every user of the host can see command lines. */
export const secretOption = Options.text("secret").pipe(
  Options.repeated,
  Options.withDescription("NAME, whose value is the caller's own variable, or NAME=@FILE; may be repeated")
)

/** The error leaves out what follows a `=`, because it may be the secret. */
const malformed = (name: string, why: string) =>
  new ParseError({
    code: "PARSE_FLAG_MALFORMED",
    message: `--secret ${JSON.stringify(name.slice(0, 64))}: ${why}`,
    hint: "--secret NAME takes the value from this environment, --secret NAME=@FILE from a file (less a newline at its end)"
  })

const isName = (name: string): boolean => /^[A-Za-z_][A-Za-z0-9_]*$/.test(name)

/** Reads the secrets that the flags name, from the environment or from files. */
export const readSecrets = Effect.fnUntraced(function* (flags: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const secrets: Record<string, Redacted.Redacted<string>> = {}
  for (const flag of flags) {
    const [name = ""] = flag.split("=", 1)
    const source = flag.slice(name.length + 1)
    if (!isName(name))
      return yield* malformed(name, "a name has letters, digits and _, and does not begin with a digit")
    if (flag === name) {
      const value = variable(name)
      if (value === "absent") return yield* malformed(name, "this environment has no such variable")
      if (value === "not text") return yield* malformed(name, "its value is not UTF-8")
      secrets[name] = Redacted.make(value.value)
      continue
    }
    if (!source.startsWith("@")) return yield* malformed(name, "a value does not belong on a command line")
    const content = yield* Effect.mapError(fs.readFile(source.slice(1)), () =>
      malformed(name, "its file cannot be read")
    )
    if (!isUtf8(content)) return yield* malformed(name, "its file is not UTF-8")
    secrets[name] = Redacted.make(
      Buffer.from(content)
        .toString()
        .replace(/\r?\n$/, "")
    )
  }
  return secrets
})
