import { Effect, Schema } from "effect"
import { SecretsError } from "../errors.ts"
import { type Secrets, validateSecrets } from "../machine/Secrets.ts"
import type { Operations } from "./operation.ts"

/** What an agent has taken. */
export class Entrusted extends Schema.Class<Entrusted>("Entrusted")({
  /** How many secrets it has now. */
  stored: Schema.Int,
  /** Names that no variable can have. */
  skipped: Schema.Array(Schema.String)
}) {}

/** A guest's secrets: in its agent's memory alone, in no copy of the guest, and in the environment of those commands that name them. */
export interface SecretStore {
  /** Adds to those there are, or changes them. Refused values: nothing is sent. */
  readonly secrets: (values: Secrets) => Effect.Effect<Entrusted, SecretsError>
  /** The agent overwrites all it has. What a process was given is that process's. */
  readonly forgetSecrets: Effect.Effect<void, SecretsError>
}

export const make = ({ ask }: Operations): SecretStore => {
  const send = (values: Readonly<Record<string, string>>, forget: boolean) =>
    ask({ op: "secrets", values, forget }).pipe(
      Effect.flatMap(Schema.decodeUnknown(Entrusted)),
      Effect.mapError(toSecretsError)
    )
  return {
    secrets: Effect.fn("Agent.secrets")(function* (values: Secrets) {
      return yield* send(yield* validateSecrets(values), false)
    }),
    forgetSecrets: Effect.asVoid(send({}, true)).pipe(Effect.withSpan("Agent.forgetSecrets"))
  }
}

/** Without the cause of what the agent did not take: nobody knows what it may quote. */
const toSecretsError = (error: { readonly _tag: string; readonly message: string }): SecretsError =>
  error._tag === "AgentRefusal"
    ? new SecretsError({
        code: "SECRETS_VALUE_INVALID",
        message: `the guest does not take the secrets: ${error.message}`
      })
    : new SecretsError({
        code: "SECRETS_AGENT_UNAVAILABLE",
        message: "the guest agent cannot be reached for its secrets",
        hint: "the VM may have ended: `machinen ls` shows what is running",
        cause: error
      })
