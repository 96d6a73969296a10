import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import type { GuestConfig } from "../guest/Initramfs.ts"
import type { Disk, Share } from "../machine/MachineSpec.ts"
import type { LiveMount, Mount, MountPlan } from "../machine/mountOptions.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import { given } from "../platform/given.ts"
import { checkHost, Mountdisk } from "./Mountdisk.ts"

/** Fails unless the host has the directories that are to be mounted. Acquires nothing. */
export const checkHosts = Effect.fn("mounts.checkHosts")(function* ({ liveMounts, mount }: MountPlan) {
  if (mount !== undefined) yield* checkHost(mount.host, "the directory to mount")
  yield* checkLiveHosts(liveMounts)
})

/** Fails unless the host has a directory or a regular file for each live mount. */
export const checkLiveHosts = (liveMounts: ReadonlyArray<LiveMount>) =>
  Effect.forEach(liveMounts, ({ guest, host }) => checkHost(host, `what is to be at ${guest}`, { file: true }), {
    discard: true
  })

const tagOf = (i: number) => `machinen-lm${i}`

/** The shares of a machine, by the live mounts of its entry. */
export const sharesOf = ({ liveMounts = [] }: VmEntry): ReadonlyArray<Share> =>
  liveMounts.map(({ gid, host, mode, uid }, i) => ({
    tag: tagOf(i),
    path: host,
    readOnly: mode === "ro",
    ...given({ uid, gid })
  }))

/** Where the guest has a file, by the tag of its share and its path there; empty for a file that has no place. */
export const guestPathOf = ({ liveMounts = [] }: VmEntry, tag: string, file: string) => {
  const share = liveMounts.find((_, i) => tagOf(i) === tag)
  return share === undefined ? "" : path.posix.join(share.guest, file)
}

/** The mounts in the guest's boot configuration. */
export const guestMounts = ({ liveMounts = [], mount }: VmEntry): Pick<GuestConfig["boot"], "mount" | "shares"> => ({
  ...(mount === undefined ? {} : { mount: mount.guest }),
  ...(liveMounts.length === 0
    ? {}
    : { shares: liveMounts.map(({ guest, mode }, i) => ({ guest, tag: tagOf(i), readOnly: mode === "ro" })) })
})

/** The two disks of a mount, and the files that the shim copies into the VM's directory for them. */
export const mountDisks = Effect.fn("mounts.mountDisks")(function* (mount: Mount, upperBytes: number, dir: string) {
  const mountdisk = yield* Mountdisk
  const [{ lowerPath }, template] = yield* Effect.all(
    [mountdisk.lower(mount.host), mountdisk.upperTemplate(upperBytes)],
    { concurrency: 2 }
  )
  const upper = path.join(dir, "mountupper.img")
  const disks: ReadonlyArray<Disk> = [
    { id: "mountlower", path: yield* linkedInto(lowerPath, path.join(dir, "mountlower.img")), readOnly: true },
    { id: "mountupper", path: upper, readOnly: false }
  ]
  return { disks, files: [{ from: template, to: upper }] }
})

/** Makes a hard link, because the file may be removed under its first name. Returns `to`, or `file` when no link can be made. */
export const linkedInto = (file: string, to: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    fs.link(file, to).pipe(
      Effect.as(to),
      Effect.orElseSucceed(() => file)
    )
  )
