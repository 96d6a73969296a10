import { Schema } from "effect"
import { ExitStatus } from "../machine/MachineSpec.ts"

/**
 * Frames between host and guest agent (docs/protocol.md §3.1): u8 type, u32 big-endian length, payload. This file is the TypeScript side;
 * `test/golden/agent-frames.json` holds both sides to the same bytes.
 */
export const FrameType = {
  request: 1,
  data: 2,
  eof: 3,
  signal: 4,
  resize: 5,
  started: 16,
  stdout: 17,
  stderr: 18,
  end: 19,
  error: 20,
  credit: 21
} as const
export type FrameType = (typeof FrameType)[keyof typeof FrameType]

const frameTypes: ReadonlySet<number> = new Set(Object.values(FrameType))
/** Types whose payload is delivered as a whole: JSON documents, and `credit`. The others are byte streams, delivered as they arrive. */
const wholeTypes: ReadonlySet<number> = new Set([
  FrameType.request,
  FrameType.started,
  FrameType.end,
  FrameType.error,
  FrameType.credit
])

/** Types whose payload has a fixed length, in bytes. */
const fixedLengths: ReadonlyMap<number, number> = new Map([
  [FrameType.eof, 0],
  [FrameType.signal, 1],
  [FrameType.resize, 4],
  [FrameType.credit, 4]
])

const maxPayload = 1024 * 1024
const maxRequest = 4 * 1024 * 1024
/** Bytes of input that a command may be sent before the guest grants credit for more. */
export const inputWindow = 1024 * 1024
/** Largest piece of input in bytes. The guest may keep back up to a quarter of the window before it grants credit, so a piece must be smaller. */
export const inputPiece = 64 * 1024
const headerSize = 5

/** A frame, or of byte streams a part of one: they are passed on in the pieces in which they arrive. */
export interface Frame {
  readonly type: FrameType
  readonly payload: Uint8Array
}

/** Encodes a header alone, so that the payload need not be copied into the same buffer. */
const encodeHeader = (type: FrameType, length: number): Buffer => {
  const header = Buffer.allocUnsafe(headerSize)
  header.writeUInt8(type, 0)
  header.writeUInt32BE(length, 1)
  return header
}

export const encodeFrame = (type: FrameType, payload: Uint8Array): Buffer =>
  Buffer.concat([encodeHeader(type, payload.length), payload])

/** Splits bytes into pieces of at most `most` bytes (default: what a frame may carry). */
export const pieces = (bytes: Uint8Array, most = maxPayload): ReadonlyArray<Uint8Array> => {
  if (bytes.length <= most) return bytes.length === 0 ? [] : [bytes]
  const parts: Array<Uint8Array> = []
  for (let at = 0; at < bytes.length; at += most) parts.push(bytes.subarray(at, at + most))
  return parts
}

/** The peer broke the framing. Nothing that follows on the stream can be read. */
export class FrameViolation extends Schema.TaggedError<FrameViolation>()("FrameViolation", {
  message: Schema.String
}) {}

/** Incremental decoder: `push` every byte in order. It holds at most one incomplete JSON payload. */
export class FrameDecoder {
  #header = Buffer.alloc(headerSize)
  #headerFill = 0
  #type: FrameType = FrameType.eof
  #left = 0
  #whole: Array<Uint8Array> | undefined

  /** Whether the bytes so far end between two frames. */
  get atBoundary(): boolean {
    return this.#headerFill === 0
  }

  /** @throws FrameViolation */
  push(chunk: Uint8Array): ReadonlyArray<Frame> {
    const frames: Array<Frame> = []
    let at = 0
    while (at < chunk.length || (this.#headerFill === headerSize && this.#left === 0)) {
      if (this.#headerFill < headerSize) {
        const n = Math.min(headerSize - this.#headerFill, chunk.length - at)
        this.#header.set(chunk.subarray(at, at + n), this.#headerFill)
        this.#headerFill += n
        at += n
        if (this.#headerFill === headerSize) this.#begin()
        continue
      }
      const n = Math.min(this.#left, chunk.length - at)
      const piece = chunk.subarray(at, at + n)
      at += n
      this.#left -= n
      if (this.#whole !== undefined) {
        // copied, because the chunk may be a view of a buffer that the socket reuses
        if (n > 0) this.#whole.push(Buffer.from(piece))
        if (this.#left === 0) frames.push({ type: this.#type, payload: Buffer.concat(this.#whole) })
      } else if (n > 0 || this.#type === FrameType.eof) {
        frames.push({ type: this.#type, payload: piece })
      }
      if (this.#left === 0) {
        this.#headerFill = 0
        this.#whole = undefined
      }
    }
    return frames
  }

  #begin() {
    const type = this.#header.readUInt8(0)
    const length = this.#header.readUInt32BE(1)
    if (!isFrameType(type)) throw new FrameViolation({ message: `unknown frame type ${type}` })
    const limit = type === FrameType.request ? maxRequest : maxPayload
    if (length > limit) throw new FrameViolation({ message: `frame of ${length} bytes; the limit is ${limit}` })
    const fixed = fixedLengths.get(type)
    if (fixed !== undefined && length !== fixed) {
      throw new FrameViolation({ message: `frame of type ${type} with ${length} bytes; it has ${fixed}` })
    }
    this.#type = type
    this.#left = length
    this.#whole = wholeTypes.has(type) ? [] : undefined
  }
}

const isFrameType = (type: number): type is FrameType => frameTypes.has(type)

const Environment = Schema.Record({ key: Schema.String, value: Schema.String })

/** Fields of `rejuvenate` and `revive`: the identity of a copy. */
const identity = {
  seed: Schema.String,
  nowMs: Schema.Int,
  hostname: Schema.String,
  machineId: Schema.String,
  generation: Schema.String,
  /** Hardware address of the network card. */
  mac: Schema.optional(Schema.String),
  /** Where directories are shared with the host, and whether each is read-only in this copy. */
  shares: Schema.optional(Schema.Array(Schema.Struct({ guest: Schema.String, readOnly: Schema.Boolean }))),
  env: Environment,
  /** Replaces the whole configuration that the original was booted with. */
  config: Schema.optional(
    Schema.Struct({
      cmd: Schema.optional(Schema.Array(Schema.String)),
      env: Environment,
      cwd: Schema.optional(Schema.String),
      makeCwd: Schema.optional(Schema.Boolean),
      user: Schema.optional(Schema.String)
    })
  )
}

/** A request to the agent, the first frame of every stream. Each operation is described in docs/protocol.md §3. */
export const AgentRequest = Schema.Union(
  Schema.Struct({
    op: Schema.Literal("exec"),
    argv: Schema.NonEmptyArray(Schema.String),
    env: Schema.optionalWith(Environment, { default: () => ({}) }),
    cwd: Schema.optional(Schema.String),
    user: Schema.optional(Schema.String),
    stdin: Schema.optionalWith(Schema.Boolean, { default: () => false }),
    secrets: Schema.optional(Schema.Array(Schema.String))
  }),
  Schema.Struct({
    op: Schema.Literal("pty"),
    /** Empty: a login shell. */
    argv: Schema.optionalWith(Schema.Array(Schema.String), { default: () => [] }),
    env: Schema.optionalWith(Environment, { default: () => ({}) }),
    cwd: Schema.optional(Schema.String),
    user: Schema.optional(Schema.String),
    secrets: Schema.optional(Schema.Array(Schema.String)),
    columns: Schema.Int,
    rows: Schema.Int,
    session: Schema.optional(Schema.String),
    steal: Schema.optionalWith(Schema.Boolean, { default: () => false })
  }),
  Schema.Struct({ op: Schema.Literal("sessions") }),
  Schema.Struct({ op: Schema.Literal("session-kill"), session: Schema.String }),
  Schema.Struct({ op: Schema.Literal("main"), stdin: Schema.Boolean, detach: Schema.Boolean }),
  Schema.Struct({
    op: Schema.Literal("write"),
    path: Schema.String,
    mode: Schema.optional(Schema.Int),
    append: Schema.Boolean,
    recursive: Schema.Boolean
  }),
  Schema.Struct({
    op: Schema.Literal("read"),
    path: Schema.String,
    offset: Schema.optional(Schema.Int),
    length: Schema.optional(Schema.Int)
  }),
  Schema.Struct({
    op: Schema.Literal("push"),
    path: Schema.String,
    /** True: `path` is the name of one file. False: `path` is the directory that is unpacked into. */
    file: Schema.optionalWith(Schema.Boolean, { default: () => false })
  }),
  Schema.Struct({
    op: Schema.Literal("pull"),
    path: Schema.String,
    /** True: a symbolic link stands for what it leads to. */
    follow: Schema.optionalWith(Schema.Boolean, { default: () => false }),
    excludes: Schema.Array(Schema.String)
  }),
  Schema.Struct({ op: Schema.Literal("image"), newest: Schema.optional(Schema.Int) }),
  Schema.Struct({
    op: Schema.Literal("stat"),
    path: Schema.String,
    /** True: describes what a symbolic link leads to. */
    follow: Schema.optionalWith(Schema.Boolean, { default: () => false })
  }),
  Schema.Struct({ op: Schema.Literal("list"), path: Schema.String }),
  Schema.Struct({
    op: Schema.Literal("mkdir"),
    path: Schema.String,
    mode: Schema.optional(Schema.Int),
    recursive: Schema.Boolean
  }),
  Schema.Struct({ op: Schema.Literal("rename"), from: Schema.String, to: Schema.String }),
  Schema.Struct({ op: Schema.Literal("remove"), path: Schema.String, recursive: Schema.Boolean }),
  Schema.Struct({ op: Schema.Literal("secrets"), values: Environment, forget: Schema.Boolean }),
  Schema.Struct({ op: Schema.Literal("stats") }),
  Schema.Struct({ op: Schema.Literal("hostname"), hostname: Schema.String }),
  Schema.Struct({ op: Schema.Literal("clock"), nowMs: Schema.Int }),
  Schema.Struct({
    op: Schema.Literal("freeze"),
    sync: Schema.Boolean,
    lazyUmount: Schema.optional(Schema.Boolean),
    timeoutMs: Schema.optional(Schema.Int)
  }),
  Schema.Struct({ op: Schema.Literal("rejuvenate"), ...identity }),
  Schema.Struct({
    op: Schema.Literal("dump"),
    tcpClose: Schema.Boolean,
    lazyUmount: Schema.Boolean,
    timeoutMs: Schema.optional(Schema.Int)
  }),
  Schema.Struct({ op: Schema.Literal("revive"), lazy: Schema.Boolean, ...identity }),
  Schema.Struct({ op: Schema.Literal("detach") }),
  Schema.Struct({
    op: Schema.Literal("tunnel"),
    to: Schema.Union(Schema.Struct({ port: Schema.Int }), Schema.Struct({ path: Schema.String }))
  }),
  Schema.Struct({ op: Schema.Literal("watch"), path: Schema.String, recursive: Schema.Boolean }),
  Schema.Struct({ op: Schema.Literal("poweroff") })
)
export type AgentRequest = typeof AgentRequest.Type

/** The payload of `started`. */
export const AgentStarted = Schema.Struct({
  pid: Schema.optional(Schema.Int),
  /** `dump`: for how many milliseconds the processes have stood still. */
  frozenMs: Schema.optional(Schema.Number),
  processes: Schema.optional(Schema.Int)
})

/** Why an operation failed in the guest; the last frame of its stream. */
export const AgentFault = Schema.Struct({
  code: Schema.Literal(
    "AGENT_BAD_REQUEST",
    "AGENT_OP_UNKNOWN",
    "AGENT_NOT_FOUND",
    "AGENT_NOT_EXECUTABLE",
    "AGENT_CWD_INVALID",
    "AGENT_BUSY",
    "AGENT_SESSION_NOT_FOUND",
    "AGENT_SESSION_IN_USE",
    "AGENT_TIMEOUT",
    "AGENT_ARGUMENTS_TOO_LARGE",
    "AGENT_NO_SPACE",
    "AGENT_WATCH_LIMIT",
    "AGENT_MOUNT_BUSY",
    "AGENT_SECRET_UNKNOWN",
    "AGENT_CRIU",
    "AGENT_IO"
  ),
  message: Schema.String,
  errno: Schema.optional(Schema.String)
})
export type AgentFault = typeof AgentFault.Type

/** Describes a file of a guest. */
export class FileStat extends Schema.Class<FileStat>("FileStat")({
  kind: Schema.Literal("file", "directory", "symlink", "other"),
  /** Size in bytes. */
  size: Schema.Number,
  /** Permission bits. */
  mode: Schema.Int,
  mtimeMs: Schema.Number,
  uid: Schema.Int,
  gid: Schema.Int,
  target: Schema.optional(Schema.String)
}) {}

/** A terminal session in a guest. */
export class TerminalSession extends Schema.Class<TerminalSession>("TerminalSession")({
  name: Schema.String,
  pid: Schema.Int,
  argv: Schema.Array(Schema.String),
  /** Unix milliseconds, by the guest's clock. */
  createdMs: Schema.Number,
  /** Whether a client is attached. */
  attached: Schema.Boolean,
  columns: Schema.Int,
  rows: Schema.Int,
  /** How the command ended; null while it runs. A client that has seen the end removes the session. */
  ended: Schema.NullOr(ExitStatus)
}) {}

/** An entry of a directory. In `name`, as in every path of a guest, a byte that is not UTF-8 is the lone surrogate U+DC00 + byte. */
export class DirectoryEntry extends FileStat.extend<DirectoryEntry>("DirectoryEntry")({ name: Schema.String }) {}

/** A change below a watched directory. Paths are relative to that directory. */
export const FileChange = Schema.Union(
  Schema.Struct({
    /** `modified`: a program that could write to the file closed it, or its attributes changed. */
    kind: Schema.Literal("created", "modified", "removed"),
    path: Schema.String
  }),
  /** A move within what is watched. A move into it is `created`, out of it `removed`. */
  Schema.Struct({ kind: Schema.Literal("moved"), from: Schema.String, path: Schema.String }),
  /** The guest's kernel dropped changes: list the directory again. Later changes are complete again. */
  Schema.Struct({ kind: Schema.Literal("lost") })
)
export type FileChange = typeof FileChange.Type

/** What a restored guest renewed before its processes went on, and what it still has in common with the original. */
export class Rejuvenation extends Schema.Class<Rejuvenation>("Rejuvenation")({
  renewed: Schema.Array(Schema.String),
  kept: Schema.Array(Schema.Struct({ what: Schema.String, why: Schema.String })),
  /** By how many milliseconds the wall clock was set forward: about the age of the snapshot. */
  clockStepMs: Schema.Number
}) {}

/** Statistics of a guest: memory, disk and uptime of the whole guest, processes of its commands. */
export class GuestStats extends Schema.Class<GuestStats>("GuestStats")({
  memory: Schema.Struct({ totalBytes: Schema.Number, availableBytes: Schema.Number }),
  uptimeMs: Schema.Number,
  /** Processes of commands, without those in control groups that commands have made themselves. */
  processes: Schema.Int,
  diskTotalBytes: Schema.Number,
  diskFreeBytes: Schema.Number,
  /** Processes that the guest kernel has killed for want of memory since boot. */
  oomKills: Schema.Int,
  /** Pages (of 4 KiB) of lazily restored processes that have not been read yet. */
  lazyPagesPending: Schema.Int,
  /** What was renewed in a copy; null in a machine that is no copy. */
  rejuvenation: Schema.NullOr(Rejuvenation)
}) {}
