import type { Readable, Writable } from "node:stream"
import type { LiveMountOption } from "../machine/mountOptions.ts"
import type { NetworkMode, PortForwardOption } from "../machine/Network.ts"
import type { Leftover } from "../machine/Registry.ts"
import type { EngineName } from "../snapshot/BundleManifest.ts"
import type * as execPty from "./execPty.ts"
import type * as VmControl from "./VmControl.ts"

/** Bytes of a guest's, as they came: not split, not decoded. */
export interface ChunkLogEvent {
  readonly source: "guest-console" | "exec-stdout" | "exec-stderr"
  /** The command, of the exec sources. */
  readonly cmd?: string
  readonly chunk: Buffer
}

/** Where the time of an operation went, in milliseconds by phase, in the order in which the phases began. */
export interface PhaseLogEvent {
  readonly source: "phase"
  readonly kind: "boot" | "provision" | "snapshot" | "restore"
  readonly phases: ReadonlyMap<string, number>
  readonly totalMs: number
}

export type LogEvent = ChunkLogEvent | PhaseLogEvent
/** What it throws is not seen by anybody but DEBUG=machinen:promise. */
export type OnLog = (event: LogEvent) => void

export interface Interruptible {
  /** Ends the operation; whatever it has acquired is released before the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal
}

/** A host directory shared with the guest. */
export type LiveMount = LiveMountOption

export interface StartOptions extends Interruptible {
  /** Unique among running VMs. */
  readonly name?: string
  /** Environment of the main command and of every command run later. */
  readonly env?: Readonly<Record<string, string>>
  /** TCP ports of this host that lead to the guest's, until the VM is gone; a copy has none of its source's. */
  readonly portForward?: ReadonlyArray<PortForwardOption>
  /** Commands of this handle, phases, and the console unless it is detached. */
  readonly onLog?: OnLog
  /** The VM outlives this process; the handle is that of `attach`. */
  readonly detached?: boolean
}

export interface BootOptions extends StartOptions {
  /**
   * `micro`, `debian`, a rootfs tarball, an ext4 image used as a read-only base, a container image (`docker://NAME`), or a name of `machinen image ls`. What it
   * says about its commands holds where these options say nothing.
   */
  readonly image?: string
  /** The main command, instead of the image's own; the VM ends with it. One or the other is needed where there is an image. Needs `image` or `rootDisk`. With neither, a VM of the default image idles until it is ended. */
  readonly cmd?: ReadonlyArray<string>
  /** Working directory of commands in the guest; absolute. Default `/`. */
  readonly guestCwd?: string
  /** An ext4 image that is the whole root and is written. `true`, the default: `image` stays as it is under a layer of the VM's own. */
  readonly rootDisk?: true | string
  /** Size of that layer in bytes, a multiple of 4096. Default 2 GiB; it takes the space that is written. */
  readonly rootDiskSizeBytes?: number
  /** Ceiling of guest memory in MiB; the host gives it as the guest touches it. Default 512: `autoSizeMemoryMib()` takes longer to boot. */
  readonly memory?: number
  /** Default 1. */
  readonly vcpus?: number
  /** `nat` (the default): the guest reaches what this host reaches. `none`: it has no network card. */
  readonly network?: NetworkMode
  /** A host directory copied into the guest below /mnt; it is never changed itself. */
  readonly mount?: { readonly host: string; readonly guest: string }
  /** Size of what the guest may write there, in bytes, a multiple of 4096. Default 4 GiB; it takes the space that is written. */
  readonly mountDiskUpperSizeBytes?: number
  /** Host directories shared with the guest below /mnt, at most 5; what either side changes the other sees. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** For `wait()`, and for a detached VM to become ready, in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
  /** A VM always dies with its owner, unless it is detached. */
  readonly pdeathsig?: true
}

export interface RestoreOptions extends StartOptions {
  /** The directory `snapshot` made. */
  readonly snapDir: string
  /** Where the source's image lies now, if it was moved. */
  readonly image?: string
  /** Of the source's live mounts, by `guest`: from another directory, or in another mode. All of them, of a bundle that is not your own. */
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** Default: as the source had it. The network of a bundle that is not your own is only connected when this says `nat`. */
  readonly network?: NetworkMode
  /** Ceiling of guest memory in MiB, of a snapshot by engine criu. Default: what the source had. */
  readonly memory?: number
  /** Memory is read when it is touched, of a snapshot by engine criu; that of the other always is. Default false. */
  readonly lazy?: boolean
  /** For `wait()`, in milliseconds; null: no limit. Default 60 000. */
  readonly timeoutMs?: number | null
}

export interface ForkOptions extends StartOptions {
  /** Keep the bundle there; otherwise nothing of it stays. */
  readonly outDir?: string
  /** For the sibling's `wait()`, in milliseconds. Default null: no limit. */
  readonly timeoutMs?: number | null
  /** The part of the host's memory that must be free, 0 to 1; 0: no matter. Default `DEFAULT_FREE_MEMORY_THRESHOLD`. */
  readonly freeMemoryThreshold?: number
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** Established TCP connections of the source are in the sibling; with engine vmstate they are in any case. Default false. */
  readonly tcpKeep?: boolean
  /** As of `restore`. */
  readonly lazy?: boolean
  readonly liveMounts?: ReadonlyArray<LiveMount>
  /** As of `snapshot`. */
  readonly lazyUmount?: boolean
}

export interface ProvisionOptions extends Interruptible {
  /** As `image` of `boot`. Default `debian`. */
  readonly base?: string
  /** Turns the base into what is wanted. The handle's commands run as root; it is over when this completes. */
  readonly install: (vm: VmHandle) => Promise<void>
  /** The tarball to write; replaced when the build is done, untouched when it fails. */
  readonly out: string
  /** The image's command and environment: what a boot of it does that is not told otherwise. */
  readonly cmd?: ReadonlyArray<string>
  readonly env?: Readonly<Record<string, string>>
  /** What the root filesystem may come to, in bytes. There is no such disk: it is a limit, and takes no space. Default 16 GiB. */
  readonly scratchDiskSizeBytes?: number
  /** For the whole build. Default 600 000. */
  readonly timeoutMs?: number
  readonly onLog?: OnLog
}

export interface ProvisionResult {
  readonly imagePath: string
  readonly sizeBytes: number
  readonly elapsedMs: number
}

export interface AttachOptions {
  /** The VMM's; this or `name`. */
  readonly pid?: number
  readonly name?: string
  /** Commands of this handle. */
  readonly onLog?: OnLog
}

export interface VsockExecOptions extends Interruptible {
  /** How long the guest may take to accept the command. Default 30 000. */
  readonly connectTimeoutMs?: number
  /** The pause before an unreachable guest is tried again. Default 250. */
  readonly retryMs?: number
  /** The command is killed after this long; null or Infinity: never. Default 300 000. */
  readonly execTimeoutMs?: number | null
  /** Gets the output as it comes; the result's field is "" then. What it throws ends the command and rejects. */
  readonly onStdout?: (chunk: Buffer) => void
  readonly onStderr?: (chunk: Buffer) => void
}

export interface VsockExecResult {
  /** 128 + signal for a command that a signal ended. */
  readonly exitCode: number
  /** UTF-8, decoded as a whole. */
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
  /** The command is told by SIGWINCH. Throws EXEC_TERMINAL_SIZE_INVALID. */
  readonly resize: (cols: number, rows: number) => void
  /** Hangs the terminal up, and with it what runs in it. */
  readonly cancel: () => void
}

export interface WriteFileOptions {
  /** Permission bits; a new file's default is 0644. */
  readonly mode?: number
  /** Make missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

export interface SnapshotOptions extends Interruptible {
  /** Absent, or an empty directory. */
  readonly outDir: string
  /** Default false: the VM ends with its snapshot. */
  readonly leaveRunning?: boolean
  /** Default: MACHINEN_SNAPSHOT_ENGINE, else `vmstate`. */
  readonly engine?: SnapshotEngine
  /** Established TCP connections are closed in what is restored; engine vmstate keeps them in any case. Default false. */
  readonly tcpClose?: boolean
  /** Processes may hold files on live mounts, which give EIO in what is restored; else SNAPSHOT_MOUNT_BUSY. Default false. */
  readonly lazyUmount?: boolean
  /** For the guest's processes to stand still, in milliseconds. Default 90 000. */
  readonly timeoutMs?: number
  /** Beside the handle's own. */
  readonly onLog?: OnLog
}

export type { VmExit } from "./VmControl.ts"
export type SnapshotEngine = EngineName

export interface SnapshotResult {
  readonly engine: SnapshotEngine
  /** Absolute. */
  readonly snapDir: string
  /** The machine's state, of engine `vmstate`. */
  readonly vmstatePath?: string
  readonly elapsedMs: number
  /** The end of what the guest had printed on its console. */
  readonly consoleLog: string
}

export interface MemoryStats {
  readonly ceilingMib: number | null
  /** The VMM's resident memory; null when it is gone. */
  readonly hostRssBytes: number | null
  /** Always 0: VMs have no balloon yet. */
  readonly balloonInflatedBytes: number
  /** Pages (of 4 KiB) of processes restored with `lazy` that are still to be read. */
  readonly lazyPagesPending: number
}

/**
 * A running VM. One from `boot`, `restore` or `fork` belongs to this process, which stays up for it, and ends with it however it ends;
 * a detached one, and one from `attach`, belongs to nobody.
 */
export interface VmHandle {
  readonly id: string
  /** The VMM's. */
  readonly pid: number
  readonly name?: string
  /** The main command's input; end it to let the command see the end. Ignored without one, as after `attach` and `restore`. */
  readonly stdin: Writable
  /**
   * The main command's output. Before it is read its last 1 MiB is kept; from then on the command waits for its reader. Ended without a
   * command, as after `attach`, `restore` and `detach`.
   */
  readonly stdout: Readable
  readonly stderr: Readable
  /** Completes when the VM is gone and nothing of it is left on the host. Fails BOOT_TIMEOUT after `timeoutMs`; the VM goes on. */
  readonly wait: () => Promise<VmControl.VmExit>
  /** Ends it at once; completes as `wait`. A VM that is gone already is fine. */
  readonly kill: () => Promise<void>
  /** Powers it off in order, or by force after the grace (default 5 s); completes as `wait`. */
  readonly stop: (graceMs?: number) => Promise<void>
  /**
   * The VM now outlives this process; the handle goes on as one of `attach`. `wait` calls under way complete with nulls; `stdin`, `stdout`
   * and `stderr` end, the main command goes on without them.
   */
  readonly detach: () => Promise<void>
  /** The last 1 MiB of what the main command has written to stdout, or stderr, so far. */
  readonly output: () => Promise<string>
  readonly errorOutput: () => Promise<string>
  /** Runs a line in the guest's `sh -c`. An exit code other than 0 rejects with EXEC_NONZERO_EXIT and the end of its stderr. */
  readonly exec: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** The same, for any exit code. */
  readonly execRaw: (cmd: string, options?: VsockExecOptions) => Promise<VsockExecResult>
  /** Runs a line in the guest's `sh -c`, in a terminal that the two streams become. */
  readonly execPty: (cmd: string, options: execPty.VsockExecPtyOptions) => VsockExecPtyHandle
  readonly writeFile: (guestPath: string, contents: Buffer | string, options?: WriteFileOptions) => Promise<void>
  readonly snapshot: (options: SnapshotOptions) => Promise<SnapshotResult>
  /** A sibling that goes on from here beside this VM; it belongs to this process. */
  readonly fork: (options?: ForkOptions) => Promise<VmHandle>
  readonly memoryStats: () => Promise<MemoryStats>
  /** Holds its CPUs. */
  readonly pause: () => Promise<void>
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
  /** The copy of a host directory: where it is, and the files it consists of. */
  readonly mountDisk?: { readonly guest: string; readonly lowerPath: string; readonly upperPath: string }
  readonly liveMounts?: ReadonlyArray<Required<LiveMount>>
  /** The bundle or VM it goes on from. */
  readonly forkedFrom?: string
  readonly memoryCeilingMib: number
  readonly detached: boolean
  /** Unix milliseconds. */
  readonly startedAt: number
}

export interface RunGcOptions {
  /** Only tell. */
  readonly dryRun?: boolean
}

export type GcResult = Leftover

export interface Client {
  readonly boot: (options?: BootOptions) => Promise<VmHandle>
  /** Builds an image in a VM of its base. */
  readonly provision: (options: ProvisionOptions) => Promise<ProvisionResult>
  /** A handle on a running VM; it fails REGISTRY_VM_NOT_FOUND when there is none. */
  readonly attach: (options: AttachOptions) => Promise<VmHandle>
  /** Running VMs, oldest first. */
  readonly list: () => Promise<ReadonlyArray<RegistryEntry>>
  /** Removes what dead VMs left behind; every first use does that by itself. */
  readonly runGc: (options?: RunGcOptions) => Promise<ReadonlyArray<GcResult>>
  /** A VM that goes on where a snapshot's source stood. */
  readonly restore: (options: RestoreOptions) => Promise<VmHandle>
}
