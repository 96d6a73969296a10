import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { BootError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { RootfsImage } from "../image/RootfsImage.ts"
import { Vmm } from "../machine/Vmm.ts"
import type { Bundle } from "./Bundle.ts"
import { type BundleManifest, channelVersion } from "./BundleManifest.ts"
import { FileHasher } from "./FileHasher.ts"
import { SnapshotEngines } from "./SnapshotEngine.ts"

/** The engine that made a bundle. Fails with BOOT_SNAPSHOT_ENGINE_INVALID when this build does not have it. */
export const engineOf = Effect.fnUntraced(function* ({ engine: name }: BundleManifest) {
  const engines = yield* SnapshotEngines
  const engine = engines.get(name)
  if (engine !== undefined) return engine
  return yield* new BootError({
    code: "BOOT_SNAPSHOT_ENGINE_INVALID",
    message: `the snapshot was taken with the engine "${name}", which is not part of this build`,
    hint: `there is: ${[...engines.keys()].join(", ")}`
  })
})

/** The machine's disks, with their paths in the bundle and on this host. */
export const disksOf = Effect.fnUntraced(function* ({ dir, manifest }: Bundle, image: string | undefined) {
  const images = yield* RootfsImage
  return yield* Effect.forEach(manifest.disks, ({ id, source }) =>
    Effect.gen(function* () {
      if (source._tag === "Blob") {
        return { id, path: path.join(dir, source.name), readOnly: source.readOnly ?? false }
      }
      return { id, path: image === undefined ? source.path : yield* images.resolve(image), readOnly: true }
    })
  )
})

/** Reasons why this host cannot restore a bundle; empty when it can. */
export const misfits = Effect.fn("compatibility.misfits")(function* (
  bundle: Bundle,
  options: { readonly image?: string }
) {
  const { manifest } = bundle
  const { sameMachine } = yield* engineOf(manifest)
  const digests = yield* FileHasher
  const fs = yield* FileSystem.FileSystem
  const vmm = yield* Vmm
  const assets = yield* Assets
  const disks = yield* disksOf(bundle, options.image)
  const here = yield* vmm.fingerprint({
    disks,
    network: manifest.network === "nat",
    shares: (manifest.liveMounts ?? []).length > 0
  })
  const there = manifest.machine
  const reasons: Array<string> = []
  const differ = (what: string, made: string | number, have: string | number) => {
    if (made !== have) reasons.push(`${what} was ${made}, here it is ${have}`)
  }
  differ("the accelerator", there.accel, here.accel)
  differ("the CPU model", there.cpu, here.cpu)
  if (sameMachine) {
    differ("the backend", there.backend, here.backend)
    differ("the VMM's version", there.vmmVersion, here.vmmVersion)
    differ("the machine type", there.machine, here.machine)
    differ("the list of devices", there.devices.join(" "), here.devices.join(" "))
    differ("the version of the guest's channel", manifest.channel, channelVersion)
  }
  // the rate is measured, so two measurements on one host differ a little
  if (sameMachine && Math.abs(there.tscKhz - here.tscKhz) > here.tscKhz / 100)
    differ("the TSC rate in kHz", there.tscKhz, here.tscKhz)
  const kernel = yield* Effect.orElseSucceed(digests.remembered(yield* assets.kernel), () => "")
  if (kernel !== manifest.kernelSha256) reasons.push("it was taken with another guest kernel")
  const { maxVcpus } = yield* vmm.capabilities
  if (manifest.vcpus > maxVcpus) reasons.push(`it has ${manifest.vcpus} vCPUs, here a VM has at most ${maxVcpus}`)
  const saved = manifest.blobs.find(({ name }) => name === "memory")
  if (saved !== undefined && saved.sizeBytes !== manifest.memoryMib * 2 ** 20) {
    reasons.push(`its memory has ${saved.sizeBytes} bytes, the machine ${manifest.memoryMib} MiB`)
  }
  for (const [i, { id, source }] of manifest.disks.entries()) {
    const file = disks[i]?.path ?? ""
    if (source._tag === "Blob") continue
    const isFile = Effect.filterOrFail(fs.stat(file), ({ type }) => type === "File")
    const found = yield* Effect.option(Effect.zipRight(isFile, digests.remembered(file)))
    if (Option.isNone(found)) reasons.push(`the image of its disk "${id}" is gone: ${file}`)
    else if (found.value !== source.sha256) reasons.push(`the image of its disk "${id}" is another one: ${file}`)
  }
  return reasons
})
