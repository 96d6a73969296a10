import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import type { Mount, MountPlan } from "./domain/mounts.ts"
import type { Disk } from "./domain/Vm.ts"
import { checkHost, Mountdisk } from "./Mountdisk.ts"

/** Whether the host has what is to be mounted; nothing has been acquired yet. */
export const checkHosts = Effect.fn("mounts.checkHosts")(function* ({ mount }: MountPlan) {
  if (mount !== undefined) yield* checkHost(mount.host, "the directory to mount")
})

/** The disks of a mount, and what has to be copied into the VM's directory for them. */
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

/** Another name for a file that may be removed under the first; where there can be none, the first. */
export const linkedInto = (file: string, to: string) =>
  Effect.flatMap(FileSystem.FileSystem, (fs) =>
    fs.link(file, to).pipe(
      Effect.as(to),
      Effect.orElseSucceed(() => file)
    )
  )
