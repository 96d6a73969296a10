import { Effect, Schema } from "effect"
import { SecretsError } from "../errors.ts"
import { type Secrets, validateSecrets } from "../machine/Secrets.ts"
import type { Operations } from "./operation.ts"

/** The agent's answer to `secrets`. */
export class StoredSecrets extends Schema.Class<StoredSecrets>("StoredSecrets")({
  /** Number of secrets that the guest has now. */
  stored: Schema.Int,
  /** Names that no variable can have; their values were not stored. */
  skipped: Schema.Array(Schema.String)
}) {}

/** A guest's secrets. They are in the agent's memory and in the environment of the commands that name them; no copy of the guest has them. */
export interface SecretStore {
  /** Adds secrets, or changes values. Sends nothing when a value is refused (SECRETS_VALUE_INVALID). */
  readonly secrets: (values: Secrets) => Effect.Effect<StoredSecrets, SecretsError>
  /** Makes the agent overwrite all secrets. Processes keep the variables that they have. */
  readonly forgetSecrets: Effect.Effect<void, SecretsError>
}

export const make = ({ ask }: Operations): SecretStore => {
  const send = (values: Readonly<Record<string, string>>, forget: boolean) =>
    ask({ op: "secrets", values, forget }).pipe(
      Effect.flatMap(Schema.decodeUnknown(StoredSecrets)),
      Effect.mapError(toSecretsError)
    )
  return {
    secrets: Effect.fn("Agent.secrets")(function* (values: Secrets) {
      return yield* send(yield* validateSecrets(values), false)
    }),
    forgetSecrets: Effect.asVoid(send({}, true)).pipe(Effect.withSpan("Agent.forgetSecrets"))
  }
}

/** Leaves out the cause when the agent refused: its message could quote a value. */
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
