import { Effect } from "effect"
import { ProvisionError } from "../errors.ts"
import { isFull } from "../platform/freeSpace.ts"
import type { ToolError, ToolFailed, ToolMissing } from "../platform/tool.ts"

/** Runs a host program and returns its stdout. `name` is the program's name in errors, when another program starts it. */
export type Tool = (
  argv: readonly [string, ...ReadonlyArray<string>],
  name?: string
) => Effect.Effect<string, ToolError>

/**
 * Turns the failure of a host program into a ProvisionError. If the disk of `dir`, where the program wrote, is full, the error is
 * ROOTFS_IMG_NO_SPACE; otherwise `meaning` decides, because the caller knows what the program was to do.
 */
export const explained =
  (dir: string, meaning: (failed: ToolFailed) => ProvisionError) =>
  <A, R>(effect: Effect.Effect<A, ToolError | ProvisionError, R>): Effect.Effect<A, ProvisionError, R> =>
    Effect.catchTags(effect, {
      ToolMissing: toolMissing,
      ToolFailed: (failed) =>
        Effect.flatMap(isFull(dir), (full) => Effect.fail(full ? noSpace(dir, failed) : meaning(failed)))
    })

export const toolMissing = ({ cause, message }: ToolMissing) =>
  Effect.fail(
    new ProvisionError({
      code: "ROOTFS_IMG_TOOL_MISSING",
      message,
      hint: "run `machinen install`, or `machinen doctor` to see what is missing",
      cause
    })
  )

/** The error of a host program that failed to make an image. */
export const buildFailed = (failed: ToolFailed) =>
  new ProvisionError({
    code: "ROOTFS_IMG_BUILD_FAILED",
    message: `the image could not be built: ${failed.message}`,
    hint: "`machinen doctor` looks at the programs that build images",
    cause: failed
  })

export const noSpace = (dir: string, failed: Error) =>
  new ProvisionError({
    code: "ROOTFS_IMG_NO_SPACE",
    message: `there is no space left in ${dir}: ${failed.message}`,
    hint: "free some space, or set MACHINEN_CACHE_DIR to a larger disk",
    cause: failed
  })

export const cacheUnwritable = (dir: string) => (cause: Error) =>
  new ProvisionError({
    code: "ROOTFS_IMG_IO",
    message: `the image cache cannot be written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${dir}, or set MACHINEN_CACHE_DIR`,
    cause
  })
