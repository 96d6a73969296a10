import * as path from "node:path"
import { Effect, Schema } from "effect"
import { BootError } from "../errors.ts"
import type { BootPlan } from "../machine/BootOptions.ts"
import { validateEnv } from "../machine/BootOptions.ts"

const Line = Schema.String.pipe(Schema.filter((text) => !text.includes("\0")))

/**
 * `machinen-config.json` at the root of an image: defaults for the commands that run in it. The caller's options override them.
 */
export const ImageConfig = Schema.Struct({
  /** Arguments that are put before the command, whether that is the caller's or the image's. */
  entrypoint: Schema.optional(Schema.NonEmptyArray(Line)),
  cmd: Schema.optional(Schema.NonEmptyArray(Line)),
  env: Schema.optional(Schema.Record({ key: Line, value: Line })),
  /** Working directory; absolute. */
  cwd: Schema.optional(Line.pipe(Schema.filter((dir) => path.posix.isAbsolute(dir)))),
  /** `user[:group]`, names or numbers. */
  user: Schema.optional(Line.pipe(Schema.minLength(1))),
  /** Ports that the image listens on, like `80/tcp`. For information only: nothing is forwarded. */
  exposedPorts: Schema.optional(Schema.Array(Line))
})
export type ImageConfig = typeof ImageConfig.Type

/** The configuration as the text of the file. */
export const ImageConfigJson = Schema.parseJson(ImageConfig)

export const configFile = "machinen-config.json"

/** Overlays `base` with `top`: each field as a whole, the environment variable by variable. */
export const overlaid = (base: ImageConfig, top: ImageConfig): ImageConfig => ({
  ...base,
  ...top,
  ...(base.env === undefined && top.env === undefined ? {} : { env: { ...base.env, ...top.env } })
})

/** Whether the configuration has no field. */
export const isEmpty = (config: ImageConfig): boolean => Object.values(config).every((value) => value === undefined)

/** Completes a boot plan with the image's defaults. The image's entrypoint is put before any command. */
export const withImageDefaults = Effect.fnUntraced(function* (plan: BootPlan, image: ImageConfig) {
  const env = { ...image.env, ...plan.env }
  yield* validateEnv(env)
  const [first, ...rest] = [...(image.entrypoint ?? []), ...(plan.command ?? image.cmd ?? [])]
  if (first === "") {
    return yield* new BootError({
      code: "BOOT_CMD_MISSING",
      message: "the image's main command is empty",
      hint: "give one"
    })
  }
  const merged: BootPlan = {
    ...plan,
    command: first === undefined ? undefined : [first, ...rest],
    env,
    cwd: plan.cwd ?? image.cwd,
    makeCwd: plan.cwd === undefined && image.cwd !== undefined,
    user: plan.user ?? image.user
  }
  return merged
})
