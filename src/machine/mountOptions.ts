import * as path from "node:path"
import { Effect, Schema } from "effect"
import { BootError } from "../errors.ts"

/** Whether the guest may write to a shared host directory. */
const MountMode = Schema.Literal("ro", "rw")
export type MountMode = typeof MountMode.Type

/** A host directory that is shared with a guest. */
export const LiveMount = Schema.Struct({
  /** Path in the guest, below /mnt, normalised. */
  guest: Schema.String,
  /** Absolute path on the host. */
  host: Schema.String,
  mode: MountMode
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
  /** An existing directory; relative to the working directory. */
  readonly host: string
  /** Path in the guest, below /mnt. */
  readonly guest: string
  /** Default "rw"; of a restore: the source's. */
  readonly mode?: MountMode
}

/** The mounts of a boot's options. */
export interface MountOptions {
  /** A host directory that is copied into the guest. The guest writes to a layer of its own; the host's directory is never changed. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** Size of that layer in bytes, a multiple of 4096. Default 4 GiB; the file is sparse and grows as the guest writes. */
  readonly mountDiskUpperSizeBytes?: number
  /** Host directories that are shared with the guest: each side sees the other's changes. At most 5. */
  readonly liveMounts?: ReadonlyArray<LiveMountOption>
}

/** Mounts after all checks, with all defaults. */
export interface MountPlan {
  readonly mount: Mount | undefined
  readonly mountUpperBytes: number
  readonly liveMounts: ReadonlyArray<LiveMount>
}

const maxLiveMounts = 5
export const defaultMountUpperBytes = 4 * 1024 ** 3

const invalid = (message: string, hint: string) => new BootError({ code: "BOOT_MOUNT_INVALID", message, hint })

/** Normalises a path in the guest (doubled and trailing slashes). Fails with BOOT_MOUNT_INVALID unless the path is below /mnt. */
export const guestPath = (guest: string): Effect.Effect<string, BootError> => {
  const parts = guest.split("/").filter((part) => part !== "" && part !== ".")
  const isBelow = guest.startsWith("/") && parts[0] === "mnt" && parts.length > 1
  return isBelow && !parts.includes("..") && !guest.includes("\0") && Buffer.byteLength(guest) < 4096
    ? Effect.succeed(`/${parts.join("/")}`)
    : invalid(
        `${JSON.stringify(guest.slice(0, 200))} is no place for a mount in the guest`,
        "give an absolute path below /mnt without `..`, such as /mnt/work"
      )
}

const hostPath = (host: string) =>
  host !== "" && !host.includes("\0")
    ? Effect.succeed(path.resolve(host))
    : invalid(`${JSON.stringify(host)} is no directory of the host`, "give an existing directory")

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
  const live = yield* Effect.forEach(liveMounts, ({ guest, host, mode = "rw" }) =>
    Schema.is(MountMode)(mode)
      ? Effect.all({ guest: guestPath(guest), host: hostPath(host), mode: Effect.succeed(mode) })
      : invalid(`a live mount cannot be ${JSON.stringify(mode)}`, "give ro or rw")
  )
  const copied =
    mount === undefined ? undefined : yield* Effect.all({ guest: guestPath(mount.guest), host: hostPath(mount.host) })
  yield* checkApart([...(copied === undefined ? [] : [copied.guest]), ...live.map(({ guest }) => guest)])
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
      message: `the original shared no directory at ${unknown.guest}`,
      hint: known.length === 0 ? "it had no live mounts" : `its live mounts are: ${known.join(", ")}`
    })
  }
  return recorded.map((share): LiveMount => {
    const at = liveMounts.findIndex(({ guest }) => guest === share.guest)
    const given = liveMounts[at]
    return given === undefined ? share : { ...given, mode: overrides[at]?.mode ?? share.mode }
  })
})

/** Refuses a mount over or inside another one: it would hide the other, or be made in the host's directory. */
const checkApart = (guests: ReadonlyArray<string>) => {
  const sorted = [...guests].sort()
  const clash = sorted.flatMap((outer, i) =>
    sorted.slice(i + 1).flatMap((inner) => (inner === outer || inner.startsWith(`${outer}/`) ? [[outer, inner]] : []))
  )[0]
  if (clash === undefined) return Effect.void
  const [outer, inner] = clash
  return invalid(
    outer === inner ? `two mounts were given for ${outer}` : `the mount ${inner} lies in the mount ${outer}`,
    "give each a place of its own below /mnt"
  )
}

const isUpperSize = (bytes: number) =>
  Number.isSafeInteger(bytes) && bytes >= 16 * 2 ** 20 && bytes <= 16 * 2 ** 40 && bytes % 4096 === 0
