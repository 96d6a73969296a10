import { Effect, Redacted } from "effect"
import { SecretsError } from "../errors.ts"

/** Values by name, for a guest's commands. A plain string is as good as a redacted one here; who prints the record had better redact. */
export type Secrets = Readonly<Record<string, string | Redacted.Redacted<string>>>

/** MAX_ARG_STRLEN of execve(2), for the whole `NAME=value`. */
const maxVariable = 128 * 1024
/** What an agent has room for. */
const maxBytes = 1024 * 1024

/**
 * The values themselves, if each can be a variable and a line. A name that no variable can have is the agent's to skip. No message holds a
 * value.
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
