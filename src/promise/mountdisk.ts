import { writeFileSync } from "node:fs"
import { Cause, Effect, Exit, Option } from "effect"
import { defaultMountUpperBytes } from "../machine/mountOptions.ts"
import { type Lower, type LowerOptions, Mountdisk } from "../mount/Mountdisk.ts"
import * as layers from "../runtime/layers.ts"

export type EnsureMountDiskImageOptions = LowerOptions
export type EnsureMountDiskImageResult = Lower

export interface EnsureMountDiskUpperOptions {
  /** Size in bytes, a multiple of 4096. Default 4 GiB; the file is sparse. */
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

/** The squashfs image of a host directory, which is made unless there is one for its content. */
export const ensureMountDiskImage = (
  hostAbs: string,
  options?: EnsureMountDiskImageOptions
): Promise<EnsureMountDiskImageResult> => withMountdisk((mountdisk) => mountdisk.lower(hostAbs, options))

/** Makes an empty file system for a writable layer, in the directory of temporary files. The caller removes it. */
export const ensureMountDiskUpper = ({ sizeBytes = defaultMountUpperBytes }: EnsureMountDiskUpperOptions = {}) =>
  withMountdisk((mountdisk) =>
    Effect.map(mountdisk.upper(sizeBytes), (upperPath): EnsureMountDiskUpperResult => ({ upperPath, sizeBytes }))
  )

/** Marks an image as whole; an image without a mark is made again. No guest can write images, so marks stay valid. */
export const markMountDiskImageClean = (imgPath: string): void => writeFileSync(`${imgPath}.ok`, "")

/** The directory of the images of host directories. */
export const mountdiskImgCacheDir = (): Promise<string> =>
  withMountdisk((mountdisk) => Effect.succeed(mountdisk.cacheDir))

/** Path of this host's `mksquashfs`; undefined when it has none. */
export const resolveMksquashfs = (): Promise<string | undefined> =>
  withMountdisk((mountdisk) => Effect.map(mountdisk.tool, Option.getOrUndefined))
