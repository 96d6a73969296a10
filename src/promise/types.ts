import type { Readable, Writable } from "node:stream"
import type { LiveMountOption } from "../machine/mountOptions.ts"
import type { NetworkMode, PortForwardOption } from "../machine/Network.ts"
import type { Leftover } from "../machine/Registry.ts"
import type { EngineName } from "../snapshot/BundleManifest.ts"
import type * as execPty from "./execPty.ts"
import type * as VmControl from "./VmControl.ts"

/** Bytes from a guest as they arrived, neither split into lines nor decoded. */
export interface ChunkLogEvent {
  readonly source: "guest-console" | "exec-stdout" | "exec-stderr"
  /** The command, for the exec sources. */
  readonly cmd?: string
  readonly chunk: Buffer
}

/** The phases of an operation: milliseconds by name, in the order in which the phases began. */
export interface PhaseLogEvent {
  readonly source: "phase"
  readonly kind: "boot" | "provision" | "snapshot" | "restore"
  readonly phases: ReadonlyMap<string, number>
  readonly totalMs: number
}

export type LogEvent = ChunkLogEvent | PhaseLogEvent
/** Receives events. An error that it throws is only shown by DEBUG=machinen:promise. */
export type OnLog = (event: LogEvent) => void

export interface Interruptible {
  /** Ends the operation. Everything that it has acquired is released before the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal
}

/** A directory or file of the host that is shared with the guest. */
export type LiveMount = LiveMountOption

export interface StartOptions extends Interruptible {
  /** Unique among running VMs. */
  readonly name?: string
  /** Environment of the main command and of every command run later. */
  readonly env?: Readonly<Record<string, string>>
  /** TCP ports of this host that are forwarded to the guest until the VM has ended. A copy has none of its source's. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /** Receives the output of this handle's commands, phases, and the console unless the VM is detached. */
  readonly onLog?: OnLog
  /** True: the VM outlives this process, and the handle is one of `attach`. Default false. */
  readonly detached?: boolean
}

export interface BootOptions extends StartOptions {
  /**
   * `micro`, `debian`, a rootfs tarball, an ext4 image that is used as a read-only base, a container image (`docker://NAME`), or a name of
   * `machinen image ls`. Default `debian`. The image's configuration gives defaults for its commands.
   */
  readonly image?: string
  /**
   * The main command, instead of the image's own; the VM ends with it. Needs `image` or `rootDisk`. With `image`, either the image or this option
   * must have a command. Without image and command, a VM of the default image idles until it is ended.
   */
  readonly cmd?: ReadonlyArray<string>
  /** Working directory of commands in the guest; absolute. Default: the image's, else `/`. */
  readonly guestCwd?: string
  /** Path of an ext4 image that is the whole root and is written. `true` (default): `image` stays unchanged below a layer of the VM's own. */
  readonly rootDisk?: true | string
  /** Size of that layer in bytes, a multiple of 4096. Default 2 GiB; the file is sparse and grows as the guest writes. */
  readonly rootDiskSizeBytes?: number
  /** Guest memory in MiB; the host allocates it as the guest touches it. Default 512. Larger values, as of `autoSizeMemoryMib()`, boot slower. */
  readonly memory?: number
  /** Number of virtual CPUs. Default 1. */
  readonly vcpus?: number
  /** `nat` (default): the guest reaches what this host reaches. `none`: the guest has no network card. */
  readonly network?: NetworkMode
  /** A host directory that is copied into the guest, below /mnt. The host's directory is never changed. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** Most bytes that the guest may write there, a multiple of 4096. Default 4 GiB; the file is sparse and grows as the guest writes. */
  readonly mountDiskUpperSizeBytes?: number
  /** Directories and files of the host that are shared with the guest, at most 64. Each side sees the other's changes. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** Time limit of `wait()`, and of a detached VM's start, in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
  /** Only `true` is accepted: a VM ends with its owner, unless it is detached. */
  readonly pdeathsig?: true
}

export interface RestoreOptions extends StartOptions {
  /** The directory that `snapshot` made. */
  readonly snapDir: string
  /** The source's image, if it was moved. */
  readonly image?: string
  /** Another directory or mode for some of the source's live mounts, by `guest`. Of a bundle that is not your own all must be given. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** Default: the source's. A bundle that is not your own is connected only when this says `nat`. */
  readonly network?: NetworkMode
  /** Guest memory in MiB, for bundles of engine criu. Default: the source's. */
  readonly memory?: number
  /** True: memory is read when it is touched. For bundles of engine criu; vmstate does so in any case. Default false. */
  readonly lazy?: boolean
  /** Time limit of `wait()` in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
}

export interface ForkOptions extends StartOptions {
  /** Keeps the bundle in this directory. Default: no bundle is kept. */
  readonly outDir?: string
  /** Time limit of the sibling's `wait()` in milliseconds. Default null: no limit. */
  readonly timeoutMs?: number | null
  /** The part of the host's memory that must be free, 0 (no limit) to 1. Default `DEFAULT_FREE_MEMORY_THRESHOLD`. */
  readonly freeMemoryThreshold?: number
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** True: established TCP connections survive in the sibling. Default false; engine vmstate keeps them in any case. */
  readonly tcpKeep?: boolean
  /** As `lazy` of `restore`. */
  readonly lazy?: boolean
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** As `lazyUmount` of `snapshot`. */
  readonly lazyUmount?: boolean
}

export interface ProvisionOptions extends Interruptible {
  /** The image that is built upon, as `image` of `boot`. Default `debian`. */
  readonly base?: string
  /** The hook that changes the base. The handle's commands run as root. The VM ends when the promise resolves. */
  readonly install: (vm: VmHandle) => Promise<void>
  /** The tarball to write. An existing file is replaced when the build is done, and unchanged when it fails. */
  readonly out: string
  /** The image's command and environment, which are defaults for its boots. */
  readonly cmd?: ReadonlyArray<string>
  readonly env?: Readonly<Record<string, string>>
  /** Most bytes of the root filesystem. A limit only, which takes no space. Default 16 GiB. */
  readonly scratchDiskSizeBytes?: number
  /** Time limit of the whole build in milliseconds. Default 600 000. */
  readonly timeoutMs?: number
  readonly onLog?: OnLog
}

export interface ProvisionResult {
  readonly imagePath: string
  readonly sizeBytes: number
  readonly elapsedMs: number
}

export interface AttachOptions {
  /** The VMM's pid. Either this or `name` is needed. */
  readonly pid?: number
  readonly name?: string
  /** Receives the output of this handle's commands. */
  readonly onLog?: OnLog
}

export interface VsockExecOptions extends Interruptible {
  /** Milliseconds in which the guest must accept the command. Default 30 000. */
  readonly connectTimeoutMs?: number
  /** Milliseconds between attempts to reach the guest. Default 250. */
  readonly retryMs?: number
  /** Milliseconds after which the command is killed; null or Infinity: never. Default 300 000. */
  readonly execTimeoutMs?: number | null
  /** Gets the output as it arrives; the result's field is then "". An error that it throws ends the command and rejects. */
  readonly onStdout?: (chunk: Buffer) => void
  readonly onStderr?: (chunk: Buffer) => void
}

export interface VsockExecResult {
  /** 128 + signal for a command that a signal ended. */
  readonly exitCode: number
  /** The output, decoded as UTF-8. */
  readonly stdout: string
  readonly stderr: string
}

export interface VsockExecPtyResult {
  /** 128 + signal for a command that a signal ended. */
  readonly exitCode: number
}

export interface VsockExecPtyHandle {
  /** Rejects with EXEC_AGENT_UNAVAILABLE when the guest does not take the command, with EXEC_CANCELLED after `cancel()`. */
  readonly result: Promise<VsockExecPtyResult>
  /** Resizes the terminal, which the command learns by SIGWINCH. Throws EXEC_TERMINAL_SIZE_INVALID. */
  readonly resize: (cols: number, rows: number) => void
  /** Hangs the terminal up, which ends the command. */
  readonly cancel: () => void
}

export interface WriteFileOptions {
  /** Permission bits. Default: 0644 for a new file; an existing file keeps its own. */
  readonly mode?: number
  /** Makes missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

export interface SnapshotOptions extends Interruptible {
  /** A directory that does not exist yet, or an empty one. */
  readonly outDir: string
  /** True: the VM keeps running. Default false: the VM ends. */
  readonly leaveRunning?: boolean
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** True: established TCP connections are closed in the copy. Default false; engine vmstate keeps them in any case. */
  readonly tcpClose?: boolean
  /** True: processes may hold locks on files of live mounts; a copy has none. Default false: rejects with SNAPSHOT_MOUNT_BUSY. */
  readonly lazyUmount?: boolean
  /** Time limit for freezing the guest's processes, in milliseconds. Default 90 000. */
  readonly timeoutMs?: number
  /** Receives events too, beside the handle's own `onLog`. */
  readonly onLog?: OnLog
}

export type { VmExit } from "./VmControl.ts"
export type SnapshotEngine = EngineName

export interface SnapshotResult {
  readonly engine: SnapshotEngine
  /** Absolute path of the bundle. */
  readonly snapDir: string
  /** Path of the machine's state; with engine vmstate only. */
  readonly vmstatePath?: string
  readonly elapsedMs: number
  /** The end of the guest's console log. */
  readonly consoleLog: string
}

export interface MemoryStats {
  readonly ceilingMib: number | null
  /** Resident bytes of the VMM; null when it has ended. */
  readonly hostRssBytes: number | null
  /** Always 0: VMs have no balloon yet. */
  readonly balloonInflatedBytes: number
  /** Pages (of 4 KiB) of processes restored with `lazy` that have not been read yet. */
  readonly lazyPagesPending: number
}

/**
 * A running VM. A VM from `boot`, `restore` or `fork` belongs to this process: it keeps the process alive, and ends with the process. A detached VM
 * does not belong to a process; a handle from `attach` does not own its VM.
 */
export interface VmHandle {
  readonly id: string
  /** The VMM's pid. */
  readonly pid: number
  readonly name?: string
  /** The main command's input; `end()` gives the command its end of file. Ignored without a main command, as after `attach` and `restore`. */
  readonly stdin: Writable
  /**
   * The main command's output. Until the first read its last MiB is kept; from then on the command waits for the reader. Without a main command, as
   * after `attach`, `restore` and `detach`, the stream has ended.
   */
  readonly stdout: Readable
  readonly stderr: Readable
  /** Resolves when the VM has ended and nothing of it is left on the host. Rejects with BOOT_TIMEOUT after `timeoutMs`; the VM keeps running. */
  readonly wait: () => Promise<VmControl.VmExit>
  /** As `wait`, without a time limit. */
  readonly ended: () => Promise<VmControl.VmExit>
  /** Kills the VM. Resolves as `wait` does, also when the VM had ended before. */
  readonly kill: () => Promise<void>
  /** Powers the VM off, or kills it after the grace (default 5 s). Resolves as `wait` does. */
  readonly stop: (graceMs?: number) => Promise<void>
  /**
   * Lets the VM outlive this process from now on; the handle becomes one of `attach`. Pending `wait` calls resolve with nulls. `stdin`, `stdout` and
   * `stderr` end, and the main command goes on without them.
   */
  readonly detach: () => Promise<void>
  /** The last MiB of the main command's stdout so far; `errorOutput`: of its stderr. */
  readonly output: () => Promise<string>
  readonly errorOutput: () => Promise<string>
  /** Runs a line in the guest's `sh -c`. An exit code other than 0 rejects with EXEC_NONZERO_EXIT and the end of the command's stderr. */
  readonly exec: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** As `exec`, but resolves with any exit code. */
  readonly execRaw: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** Runs a line in the guest's `sh -c`, in a terminal that is connected to the two streams. */
  readonly execPty: (cmd: string, options: execPty.VsockExecPtyOptions) => VsockExecPtyHandle
  /** Writes a file in the guest. A string is written as UTF-8. Rejects with FilesError. */
  readonly writeFile: (guestPath: string, contents: Buffer | string, options?: WriteFileOptions) => Promise<void>
  /** Saves the VM as a bundle. Unless `leaveRunning`, the VM ends. Rejects with SnapshotError. */
  readonly snapshot: (options: SnapshotOptions) => Promise<SnapshotResult>
  /** Starts a sibling that continues from this moment. This VM keeps running; the sibling belongs to this process. */
  readonly fork: (options?: ForkOptions) => Promise<VmHandle>
  /** Memory use of the VM; values that are not known are null or 0. */
  readonly memoryStats: () => Promise<MemoryStats>
  /** Stops the vCPUs until `resume`. */
  readonly pause: () => Promise<void>
  /** Lets the vCPUs go on, and sets the guest's clock. */
  readonly resume: () => Promise<void>
}

/** A running VM as `list` shows it. */
export interface RegistryEntry {
  readonly id: string
  readonly pid: number
  readonly name?: string
  /** The guest channel's unix socket (docs/protocol.md §2). */
  readonly socketPath: string
  readonly imagePath: string
  /** The copy of a host directory: its path in the guest, and the files of its two layers. */
  readonly mountDisk?: { readonly guest: string; readonly lowerPath: string; readonly upperPath: string }
  readonly liveMounts?: ReadonlyArray<LiveMount & Required<Pick<LiveMount, "mode">>>
  /** Why the guest has lost its live mounts: their server has ended. */
  readonly liveMountsLost?: string
  /** The bundle that the VM was restored from, or the id of the VM that it was forked from. */
  readonly forkedFrom?: string
  readonly memoryCeilingMib: number
  readonly detached: boolean
  /** Unix milliseconds. */
  readonly startedAt: number
}

export interface RunGcOptions {
  /** True: only lists what would be removed. Default false. */
  readonly dryRun?: boolean
}

export type GcResult = Leftover

/** The functions of the Promise API. */
export interface Client {
  /** Boots a VM, and starts its main command if it has one. Resolves when the guest is ready. */
  readonly boot: (options?: BootOptions) => Promise<VmHandle>
  /** Builds an image: boots a base, runs the hook in it, and writes its root filesystem to a tarball. */
  readonly provision: (options: ProvisionOptions) => Promise<ProvisionResult>
  /** A handle on a running VM. Rejects with REGISTRY_VM_NOT_FOUND when there is no such VM. */
  readonly attach: (options: AttachOptions) => Promise<VmHandle>
  /** Running VMs, oldest first. */
  readonly list: () => Promise<ReadonlyArray<RegistryEntry>>
  /** Removes what dead VMs left behind. The first use of the API in a process does so too. */
  readonly runGc: (options?: RunGcOptions) => Promise<ReadonlyArray<GcResult>>
  /** Starts a VM that continues where a snapshot's source was saved. */
  readonly restore: (options: RestoreOptions) => Promise<VmHandle>
}
