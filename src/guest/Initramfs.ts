import type { guestNetwork } from "../machine/Network.ts"

/**
 * An entry of an initramfs: a cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), with
 * ASCII headers of 13 eight-digit hexadecimal fields, and names and data padded to four bytes.
 */
export interface CpioEntry {
  readonly name: string
  /** File type and permission bits, as st_mode. */
  readonly mode: number
  readonly data?: Uint8Array
  /** Device number of a device node. */
  readonly device?: readonly [major: number, minor: number]
}

const hex = (n: number) => n.toString(16).padStart(8, "0")
const padding = (length: number) => Buffer.alloc((4 - (length % 4)) % 4)

const header = (entry: CpioEntry, inode: number): Buffer => {
  const [major, minor] = entry.device ?? [0, 0]
  const size = entry.data?.length ?? 0
  const links = 1
  const values = [inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, Buffer.byteLength(entry.name) + 1, 0]
  const head = Buffer.from(`070701${values.map(hex).join("")}${entry.name}\0`)
  return Buffer.concat([head, padding(head.length)])
}

/** Encodes one entry: header with name, data, padding. */
export const cpioPieces = (entry: CpioEntry, inode: number): ReadonlyArray<Uint8Array> => {
  const data = entry.data ?? new Uint8Array(0)
  return [header(entry, inode), data, padding(data.length)]
}

/** Encodes an archive of these entries, in this order: directories must come before their entries. The same entries give the same bytes. */
export const cpio = (entries: ReadonlyArray<CpioEntry>): Buffer =>
  Buffer.concat([...entries, { name: "TRAILER!!!", mode: 0 }].flatMap((entry, index) => cpioPieces(entry, index + 1)))

const directory = 0o040000
const file = 0o100000
const characterDevice = 0o020000

/** The configuration that the guest reads before it can be talked to (docs/protocol.md §4). */
export interface GuestConfig {
  /** `/machinen-config.json`: what image and options say about commands. */
  readonly config: {
    readonly cmd?: ReadonlyArray<string>
    readonly env: Readonly<Record<string, string>>
    readonly cwd?: string
    /** The guest makes `cwd` if it is missing. */
    readonly makeCwd?: boolean
    readonly user?: string
  }
  /** `/machinen-boot.json`: what only this boot needs. */
  readonly boot: {
    readonly version: 1
    readonly id: string
    readonly hostname: string
    readonly root: "overlay" | "disk"
    /** Where the disks `mountlower` and `mountupper` are mounted. */
    readonly mount?: string
    /** What is shared with the host: where each is mounted, its name in the root of the host's file server, whether it is mounted read-only. */
    readonly shares?: ReadonlyArray<{ readonly guest: string; readonly tag: string; readonly readOnly: boolean }>
    /** The disk holds processes that are to be restored; the guest serves nothing else before (`revive`). */
    readonly revive?: boolean
    /** Addresses of the network card; absent: the machine has none. */
    readonly network?: typeof guestNetwork
  }
}

/** The initramfs of a boot: our init, a console for it, and the guest's configuration. */
export const forBoot = (init: Uint8Array, guest: GuestConfig): Buffer =>
  cpio([
    { name: ".", mode: directory | 0o755 },
    { name: "dev", mode: directory | 0o755 },
    { name: "dev/console", mode: characterDevice | 0o600, device: [5, 1] },
    { name: "init", mode: file | 0o755, data: init },
    { name: "machinen-config.json", mode: file | 0o644, data: Buffer.from(JSON.stringify(guest.config)) },
    { name: "machinen-boot.json", mode: file | 0o644, data: Buffer.from(JSON.stringify(guest.boot)) }
  ])
