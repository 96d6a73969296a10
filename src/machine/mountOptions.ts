import * as path from "node:path"
import { Effect, Schema } from "effect"
import { BootError } from "../errors.ts"
import { given } from "../platform/given.ts"
import { OwnerId } from "./MachineSpec.ts"

/** Whether the guest may write to a shared host directory. */
const MountMode = Schema.Literal("ro", "rw")
export type MountMode = typeof MountMode.Type

/** A directory or file of the host that is shared with a guest. */
export const LiveMount = Schema.Struct({
  /** Absolute path in the guest, normalised. */
  guest: Schema.String,
  /** Absolute path on the host. */
  host: Schema.String,
  mode: MountMode,
  /** Which user of the guest the files' owner is; absent: for root the same number, else the guest's root. */
  uid: Schema.optionalWith(OwnerId, { exact: true }),
  gid: Schema.optionalWith(OwnerId, { exact: true })
})
export type LiveMount = typeof LiveMount.Type

/** A copy of a host directory, mounted in a guest. */
export const Mount = Schema.Struct({
  guest: Schema.String,
  /** The directory that was copied. It is not read again. */
  host: Schema.String
})
export type Mount = typeof Mount.Type

/** A live mount in the options. */
export interface LiveMountOption {
  /** An existing directory or regular file; relative to the working directory. */
  readonly host: string
  /** Absolute path in the guest, not /, /proc, /sys, /dev or below these. It is made if it is missing, and may lie in another live mount. */
  readonly guest: string
  /** Default "rw"; of a restore: the source's. */
  readonly mode?: MountMode
  /**
   * Which user of the guest the owner of the files is. On the host that owner is, when root runs the VM, the owner of `host`, else the user who runs
   * the VM. Default: for root all owners keep their numbers, for another user that user's files are the guest's root's; of a restore: the source's.
   */
  readonly uid?: number
  /** As `uid`, for the group. */
  readonly gid?: number
}

/** The mounts of a boot's options. */
export interface MountOptions {
  /** A host directory that is copied into the guest. The guest writes to a layer of its own; the host's directory is never changed. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** Size of that layer in bytes, a multiple of 4096. Default 4 GiB; the file is sparse and grows as the guest writes. */
  readonly mountDiskUpperSizeBytes?: number
  /** Directories and files of the host that are shared with the guest: each side sees the other's changes. At most 64. */
  readonly liveMounts?: ReadonlyArray<LiveMountOption>
}

/** Mounts after all checks, with all defaults. */
export interface MountPlan {
  readonly mount: Mount | undefined
  readonly mountUpperBytes: number
  readonly liveMounts: ReadonlyArray<LiveMount>
}

const maxLiveMounts = 64
export const defaultMountUpperBytes = 4 * 1024 ** 3

const invalid = (message: string, hint: string) => new BootError({ code: "BOOT_MOUNT_INVALID", message, hint })

/** The names of a path in the guest. `undefined`: no mount can be made there, wherever it is. */
const namesOf = (guest: string): ReadonlyArray<string> | undefined => {
  const names = guest.split("/").filter((name) => name !== "" && name !== ".")
  const fits = Buffer.byteLength(guest) < 4096 && names.every((name) => Buffer.byteLength(name) <= 255)
  return guest.startsWith("/") && fits && !names.includes("..") && !guest.includes("\0") ? names : undefined
}

const noPlace = (guest: string, hint: string) =>
  invalid(`${JSON.stringify(guest.slice(0, 200))} is no place for a mount in the guest`, hint)

/** Normalises the guest path of a copied mount (doubled and trailing slashes). Fails with BOOT_MOUNT_INVALID unless it is below /mnt. */
export const guestPath = (guest: string): Effect.Effect<string, BootError> => {
  const names = namesOf(guest)
  return names !== undefined && names[0] === "mnt" && names.length > 1
    ? Effect.succeed(`/${names.join("/")}`)
    : noPlace(guest, "give an absolute path below /mnt without `..`, such as /mnt/work")
}

/** What the guest's kernel and agent have for themselves. */
const reserved = ["/proc", "/sys", "/dev", "/run/machinen", "/var/lib/machinen"]

/** Normalises the guest path of a live mount. Fails with BOOT_MOUNT_INVALID for the root and what is `reserved`. */
export const livePath = (guest: string): Effect.Effect<string, BootError> => {
  const names = namesOf(guest)
  if (names === undefined) return noPlace(guest, "give an absolute path without `..`, such as /work")
  if (names.length === 0) return noPlace(guest, "give a directory below /, such as /work")
  const place = `/${names.join("/")}`
  const owner = reserved.find((root) => isAtOrIn(place, root))
  return owner === undefined
    ? Effect.succeed(place)
    : noPlace(guest, `${owner} is the guest's own; give another path, such as /work`)
}

const isAtOrIn = (place: string, outer: string) => place === outer || place.startsWith(`${outer}/`)

const hostPath = (host: string) =>
  host !== "" && !host.includes("\0")
    ? Effect.succeed(path.resolve(host))
    : invalid(`${JSON.stringify(host)} is no path of the host`, "give an existing directory")

const owners = ({ gid, uid }: LiveMountOption) => {
  const isOwner = Schema.is(Schema.UndefinedOr(OwnerId))
  return isOwner(uid) && isOwner(gid)
    ? Effect.succeed(given({ uid, gid }))
    : invalid(
        `the files of a live mount cannot belong to user ${uid}, group ${gid}`,
        "give whole numbers from 0 to 4294967294"
      )
}

const livePlan = Effect.fnUntraced(function* (option: LiveMountOption) {
  const { guest, host, mode = "rw" } = option
  if (!Schema.is(MountMode)(mode)) {
    return yield* invalid(`a live mount cannot be ${JSON.stringify(mode)}`, "give ro or rw")
  }
  const plan: LiveMount = {
    guest: yield* livePath(guest),
    host: yield* hostPath(host),
    mode,
    ...(yield* owners(option))
  }
  return plan
})

/** Checks mounts without touching the host, and fills in defaults. Fails with BOOT_MOUNT_INVALID. */
export const validateMounts = Effect.fnUntraced(function* (options: MountOptions) {
  const { liveMounts = [], mount, mountDiskUpperSizeBytes = defaultMountUpperBytes } = options
  if (liveMounts.length > maxLiveMounts) {
    return yield* invalid(
      `${liveMounts.length} live mounts were given; the limit is ${maxLiveMounts}`,
      "share a directory above several of them"
    )
  }
  if (!isUpperSize(mountDiskUpperSizeBytes)) {
    return yield* invalid(
      `the writable layer of a mount cannot have ${mountDiskUpperSizeBytes} bytes`,
      "give a multiple of 4096 from 16 MiB to 16 TiB"
    )
  }
  const live = yield* Effect.forEach(liveMounts, livePlan)
  const copied =
    mount === undefined ? undefined : yield* Effect.all({ guest: guestPath(mount.guest), host: hostPath(mount.host) })
  yield* checkPlaces(
    live.map(({ guest }) => guest),
    copied?.guest
  )
  const plan: MountPlan = { mount: copied, mountUpperBytes: mountDiskUpperSizeBytes, liveMounts: live }
  return plan
})

/**
 * The shares of a copy: the original's, with another directory or mode where the options name one. Further shares are refused
 * (BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN): a saved machine has no place for them.
 */
export const overridden = Effect.fnUntraced(function* (
  recorded: ReadonlyArray<LiveMount>,
  overrides: ReadonlyArray<LiveMountOption>
) {
  const { liveMounts } = yield* validateMounts({ liveMounts: overrides })
  const unknown = liveMounts.find(({ guest }) => !recorded.some((share) => share.guest === guest))
  if (unknown !== undefined) {
    const known = recorded.map(({ guest }) => guest)
    return yield* new BootError({
      code: "BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN",
      message: `the original shared nothing at ${unknown.guest}`,
      hint: known.length === 0 ? "it had no live mounts" : `its live mounts are: ${known.join(", ")}`
    })
  }
  return recorded.map((share): LiveMount => {
    const at = liveMounts.findIndex(({ guest }) => guest === share.guest)
    const other = liveMounts[at]
    return other === undefined ? share : { ...share, ...other, mode: overrides[at]?.mode ?? share.mode }
  })
})

/** Refuses two mounts at one place, and the copy where a live mount would hide it. Live mounts may lie in each other. */
const checkPlaces = (live: ReadonlyArray<string>, copy: string | undefined) => {
  const all = copy === undefined ? live : [copy, ...live]
  const twice = all.find((place, i) => all.indexOf(place) !== i)
  if (twice !== undefined) {
    return invalid(`two mounts were given for ${twice}`, "give each a place of its own")
  }
  const over = copy === undefined ? undefined : live.find((place) => isAtOrIn(copy, place))
  return over === undefined
    ? Effect.void
    : invalid(`the live mount ${over} would hide the mount ${copy}`, "give them places beside each other")
}

const isUpperSize = (bytes: number) =>
  Number.isSafeInteger(bytes) && bytes >= 16 * 2 ** 20 && bytes <= 16 * 2 ** 40 && bytes % 4096 === 0
