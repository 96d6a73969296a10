import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { ProvisionError } from "../errors.ts"
import { Settings } from "../Settings.ts"
import { Assets } from "./Assets.ts"

/** A file that machines are made from, unless the user names another. */
export type BaseAsset = "rootfs" | "kernel" | "dtb"

const missingCode = {
  rootfs: "PROVISION_BASE_NOT_FOUND",
  kernel: "PROVISION_KERNEL_NOT_FOUND",
  dtb: "PROVISION_DTB_NOT_FOUND"
} as const

/** File names in MACHINEN_ASSETS_DIR, for an architecture by Debian's name. */
const fileNames = (arch: string): Readonly<Record<BaseAsset, string>> => {
  const debian = arch === "x64" ? "amd64" : arch
  return {
    rootfs: `rootfs-debian-${debian}.tar.gz`,
    kernel: debian === "amd64" ? "vmlinux-amd64" : `Image-${debian}`,
    dtb: `virt-${debian}.dtb`
  }
}

/**
 * Resolves a base asset: an explicit path, else the file in MACHINEN_ASSETS_DIR, else what set-up built. The first one that is given decides,
 * whether its file exists or not. Set-up makes no device tree, because an x86 machine has none. Fails with PROVISION_*_NOT_FOUND or
 * PROVISION_ASSETS_DIR_INVALID.
 */
export const resolve = Effect.fn("baseAssets.resolve")(function* (
  kind: BaseAsset,
  explicit?: string,
  cwd: string = process.cwd()
) {
  const fs = yield* FileSystem.FileSystem
  const settings = yield* Settings
  const assets = yield* Assets
  const isFile = (file: string) =>
    fs.stat(file).pipe(
      Effect.map(({ type }) => type === "File"),
      Effect.orElseSucceed(() => false)
    )

  if (explicit !== undefined) {
    const file = path.resolve(cwd, explicit)
    if (yield* isFile(file)) return file
    return yield* new ProvisionError({
      code: missingCode[kind],
      message: `there is no ${kind} ${file}`,
      hint: "correct the path, or leave it out for the one set-up makes"
    })
  }
  if (Option.isSome(settings.baseAssetsDir)) {
    const file = path.resolve(cwd, settings.baseAssetsDir.value, fileNames(process.arch)[kind])
    if (yield* isFile(file)) return file
    return yield* new ProvisionError({
      code: "PROVISION_ASSETS_DIR_INVALID",
      message: `MACHINEN_ASSETS_DIR has no ${kind}: there is no ${file}`,
      hint: "put it there, or unset MACHINEN_ASSETS_DIR for what set-up makes"
    })
  }
  const made = { rootfs: assets.base("debian"), kernel: assets.kernel, dtb: Effect.fail(undefined) }[kind]
  return yield* Effect.mapError(
    made,
    (cause) =>
      new ProvisionError({
        code: missingCode[kind],
        message:
          cause === undefined
            ? "there is no device tree: an x86 machine has none"
            : `there is no ${kind}: ${cause.message}`,
        hint: cause === undefined ? "give one of your own, if you have use for it" : "run `machinen install`",
        cause
      })
  )
})
