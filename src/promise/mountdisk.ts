import { writeFileSync } from "node:fs"
import { Cause, Effect, Exit, Option } from "effect"
import { defaultMountUpperBytes } from "../machine/mountOptions.ts"
import { type Lower, type LowerOptions, Mountdisk } from "../mount/Mountdisk.ts"
import * as layers from "../runtime/layers.ts"

export type EnsureMountDiskImageOptions = LowerOptions
export type EnsureMountDiskImageResult = Lower

export interface EnsureMountDiskUpperOptions {
  /** A multiple of 4096. Default 4 GiB, as a hole. */
  readonly sizeBytes?: number
}

export interface EnsureMountDiskUpperResult {
  readonly upperPath: string
  readonly sizeBytes: number
}

const withMountdisk = async <A, E>(use: (mountdisk: Mountdisk["Type"]) => Effect.Effect<A, E>): Promise<A> => {
  const exit = await Effect.runPromiseExit(
    Effect.provide(Effect.flatMap(Mountdisk, use), layers.layerWithoutReconcile).pipe(Effect.scoped)
  )
  if (Exit.isSuccess(exit)) return exit.value
  throw Cause.originalError(Cause.squash(exit.cause))
}

/** A host directory as a squashfs image, made unless there is one for what it holds. */
export const ensureMountDiskImage = (
  hostAbs: string,
  options?: EnsureMountDiskImageOptions
): Promise<EnsureMountDiskImageResult> => withMountdisk((mountdisk) => mountdisk.lower(hostAbs, options))

/** A new empty file system to write to above it, in the directory for temporary files; it is the caller's to remove. */
export const ensureMountDiskUpper = ({ sizeBytes = defaultMountUpperBytes }: EnsureMountDiskUpperOptions = {}) =>
  withMountdisk((mountdisk) =>
    Effect.map(mountdisk.upper(sizeBytes), (upperPath): EnsureMountDiskUpperResult => ({ upperPath, sizeBytes }))
  )

/** Says of an image that it is whole: one without a mark is made again. No guest can write one, so marks stay. */
export const markMountDiskImageClean = (imgPath: string): void => writeFileSync(`${imgPath}.ok`, "")

/** Where images of host directories are kept. */
export const mountdiskImgCacheDir = (): Promise<string> =>
  withMountdisk((mountdisk) => Effect.succeed(mountdisk.cacheDir))

/** This host's `mksquashfs`. */
export const resolveMksquashfs = (): Promise<string | undefined> =>
  withMountdisk((mountdisk) => Effect.map(mountdisk.tool, Option.getOrUndefined))
