import { Cause, Effect, Exit } from "effect"
import type { MachinenError } from "../errors.ts"
import * as baseAssets from "../host/baseAssets.ts"
import * as InitramfsPackers from "../initramfs/index.ts"
import * as layers from "../runtime/layers.ts"
import type { Settings } from "../Settings.ts"

/**
 * Packers of initramfs archives (src/initramfs/index.ts). Default of `initPath`: the guest program that set-up builds.
 */
const pack =
  <O, A>(packer: (options: O) => Effect.Effect<A, MachinenError, InitramfsPackers.Services | Settings>) =>
  async (options: O): Promise<A> => {
    const exit = await Effect.runPromiseExit(Effect.provide(packer(options), layers.packing))
    if (Exit.isFailure(exit)) throw Cause.originalError(Cause.squash(exit.cause))
    return exit.value
  }
const resolveBase =
  (kind: baseAssets.BaseAsset) =>
  (explicit?: string, cwd?: string): Promise<string> =>
    pack((_: undefined) => baseAssets.resolve(kind, explicit, cwd))(undefined)
/** Resolves a base asset: the given path, else the file in MACHINEN_ASSETS_DIR, else what set-up built. */
export const resolveBaseRootfs = resolveBase("rootfs")
export const resolveBaseKernel = resolveBase("kernel")
export const resolveBaseDtb = resolveBase("dtb")
export const mkinitramfsBundle = pack(InitramfsPackers.bundle)
export const mkinitramfsTinyBundle = pack(InitramfsPackers.tinyBundle)
export const mkinitramfsRootfs = pack(InitramfsPackers.rootfs)
export const mkinitramfsMinimal = pack(InitramfsPackers.minimal)
export const mkinitramfsWorkspace = pack(InitramfsPackers.workspace)
export const mkinitramfsCli = pack(InitramfsPackers.cli)
export type {
  BundleOptions as PackBundleOptions,
  MinimalOptions as PackMinimalOptions,
  RootfsOptions as PackRootfsOptions,
  TinyBundleOptions as PackTinyBundleOptions,
  WorkspaceOptions as PackWorkspaceOptions
} from "../initramfs/index.ts"
