import { Effect, Redacted } from "effect"
import { SecretsError } from "../errors.ts"

/** Values by name, for a guest's commands. Use `Redacted` values where the record itself might be printed. */
export type Secrets = Readonly<Record<string, string | Redacted.Redacted<string>>>

/** Longest `NAME=value` in bytes: MAX_ARG_STRLEN of execve(2). */
const maxVariable = 128 * 1024
/** Most bytes of names and values together that the agent takes. */
const maxBytes = 1024 * 1024

/**
 * Checks that each value can be a variable, and returns the plain values. Names that no variable can have are left in: the agent skips them.
 * Fails with SECRETS_VALUE_INVALID; no message holds a value.
 */
export const validateSecrets = Effect.fnUntraced(function* (secrets: Secrets) {
  const refuse = (message: string, hint: string) => new SecretsError({ code: "SECRETS_VALUE_INVALID", message, hint })
  const revealed: Record<string, string> = {}
  let total = 0
  for (const [name, secret] of Object.entries(secrets)) {
    const value = Redacted.isRedacted(secret) ? Redacted.value(secret) : secret
    const shown = JSON.stringify(name.slice(0, 64))
    if (typeof value !== "string" || /[\n\0]/.test(value)) {
      return yield* refuse(
        `the secret ${shown} is not one line of text`,
        "encode it, or write it to a file in the guest"
      )
    }
    const size = Buffer.byteLength(name) + Buffer.byteLength(value) + 2
    total += size
    if (size > maxVariable || total > maxBytes) {
      return yield* refuse(
        `the secret ${shown} is too large: ${size} bytes, ${total} with those before it`,
        "a variable holds 128 KiB, a guest's secrets 1 MiB; write more to a file in the guest"
      )
    }
    Object.defineProperty(revealed, name, { value, enumerable: true })
  }
  return revealed
})
