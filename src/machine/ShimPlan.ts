import { Schema } from "effect"
import { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import { Share } from "./MachineSpec.ts"
import { VmEntry } from "./VmEntry.ts"

/** The shim's instructions for one VM, sent as one JSON line on its stdin (docs/protocol.md §5.1). All paths are absolute. */
export class ShimPlan extends Schema.Class<ShimPlan>("ShimPlan")({
  version: Schema.Literal(1),
  id: Schema.String,
  dir: Schema.String,
  /** Copied sparsely before the VMM starts; extended with a hole to `size` bytes. */
  files: Schema.Array(Schema.Struct({ from: Schema.String, to: Schema.String, size: Schema.optional(Schema.Number) })),
  vmm: Schema.Struct({
    argv: Schema.NonEmptyArray(Schema.String),
    env: Schema.Record({ key: Schema.String, value: Schema.String })
  }),
  /** The guest channel over an inherited descriptor, or null when the VMM serves `vsock.sock` itself. */
  channel: Schema.NullOr(Schema.Struct({ fd: Schema.Int, vsockPath: Schema.String, resume: Schema.Boolean })),
  console: Schema.Struct({ fd: Schema.Int, logPath: Schema.String, maxBytes: Schema.Int }),
  /** The guest's memory, which the VMM finds at /proc/self/fd/<fd>: a new memfd, or a file that is mapped copy-on-write. */
  memory: Schema.optional(
    Schema.Union(
      Schema.Struct({ fd: Schema.Int, sizeBytes: Schema.Int }),
      Schema.Struct({ fd: Schema.Int, from: Schema.String })
    )
  ),
  /** Files that the VMM inherits as open, read-only descriptors. */
  inherit: Schema.optional(Schema.Array(Schema.Struct({ fd: Schema.Int, path: Schema.String }))),
  /** The guest's network card: `fd` is the listener of its other end, which `gvproxy` serves. */
  network: Schema.optional(
    Schema.Struct({
      fd: Schema.Int,
      gvproxy: Schema.Struct({
        argv: Schema.NonEmptyArray(Schema.String),
        env: Schema.Record({ key: Schema.String, value: Schema.String })
      }),
      forwards: Schema.Array(Schema.Struct({ host: Schema.String, guestPort: Schema.Int }))
    })
  ),
  /** What the guest shares with the host: `fd` is the VMM's end of the stream to the server. */
  shares: Schema.optional(
    Schema.Struct({
      fd: Schema.Int,
      argv: Schema.NonEmptyArray(Schema.String),
      env: Schema.Record({ key: Schema.String, value: Schema.String }),
      parts: Schema.Array(Share),
      /** What the server of a saved machine has saved. */
      state: Schema.optional(Schema.String)
    })
  ),
  outputLogPath: Schema.String,
  vmmLogPath: Schema.String,
  controlPath: Schema.String,
  entryPath: Schema.String,
  entry: VmEntry,
  cleanup: Schema.Array(Schema.String),
  detached: Schema.Boolean,
  graceMs: Schema.Int
}) {}

/** How a VM ended. */
export class ExitRecord extends Schema.Class<ExitRecord>("ExitRecord")({
  vmm: Schema.Struct({ code: Schema.NullOr(Schema.Int), signal: Schema.NullOr(Schema.Int) }),
  /** How the main command ended, if the guest reported it. */
  main: Schema.NullOr(Schema.Struct({ code: Schema.Int, signal: Schema.NullOr(Schema.Int) })),
  /** The guest announced its power-off. False after a crash or a kill. */
  orderly: Schema.Boolean,
  /**
   * The request or event that ended the VM (docs/protocol.md §5.3). No shim writes the last two: `shim-lost`, the shim was killed and has recorded nothing; `unseen`, the
   * shim has cleaned up and ended before this program asked.
   */
  reason: Schema.Literal("guest", "stop", "kill", "owner-lost", "vmm", "shim-lost", "unseen"),
  consoleTail: Schema.String,
  vmmLogTail: Schema.String
}) {}

/** The console line that says why a guest failed: its kernel's panic, or the last line of our init. */
export const guestFailure = (console: string): string | undefined =>
  (/Kernel panic[^\n]*/.exec(console) ?? /machinen-init: [^\n]*/.exec(console))?.[0].trim()

/** Whether a VM ended though neither its guest nor a user had asked for it. */
export const hasFailed = ({ reason }: ExitRecord): boolean => reason === "vmm" || reason === "shim-lost"

/** Says how a VM ended: a sentence without its full stop. */
export const howEnded = ({ consoleTail, reason, vmm }: ExitRecord): string => {
  switch (reason) {
    case "guest":
      return "the guest powered itself off"
    case "stop":
      return "the VM was stopped"
    case "kill":
      return "the VM was stopped by force"
    case "owner-lost":
      return "the VM ended with the program that had started it"
    case "shim-lost":
      return "the VM ended (nobody recorded how)"
    case "unseen":
      return "the VM ended"
    case "vmm": {
      const failure = guestFailure(consoleTail)
      const code = vmm.signal === null ? `code ${vmm.code}` : `signal ${vmm.signal}`
      return failure === undefined ? `the VMM ended (${code})` : `the guest failed: ${failure}`
    }
  }
}

/** What the server of shared directories said when it started. */
export const ShareReport = Schema.Struct({
  /** By what it is confined to the shares: `landlock`, `seccomp`. */
  confinement: Schema.Array(Schema.String),
  /** Files that a saved guest had open, and that are gone or others now: it gets EIO for these. */
  lost: Schema.Array(Schema.Struct({ tag: Schema.String, path: Schema.String, why: Schema.String }))
})
export type ShareReport = typeof ShareReport.Type

/** The shim's events on stdout, one JSON object a line (docs/protocol.md §5.2). */
export const ShimEvent = Schema.Union(
  Schema.Struct({
    event: Schema.Literal("started"),
    shim: ProcessIdentity,
    vmm: ProcessIdentity,
    shares: Schema.optional(ShareReport)
  }),
  Schema.Struct({
    event: Schema.Literal("failed"),
    step: Schema.Literal("plan", "network", "files", "registry", "shares", "vmm"),
    code: Schema.String,
    /** At `network` the host's socket of a forwarded port. At other steps a path, a program, or words. */
    subject: Schema.String,
    message: Schema.String
  }),
  Schema.Struct({ event: Schema.Literal("exited"), exit: ExitRecord })
)
export type ShimEvent = typeof ShimEvent.Type
