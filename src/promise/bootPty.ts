/** Runs a program of this host in a terminal and gives it the handle of a VM: for VMMs of the caller's own, and for `Sandboxes`. */
import { accessSync, constants, statSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { type Readable, Writable } from "node:stream"
import { Effect } from "effect"
import { BootError } from "../errors.ts"
import { checkSize } from "../guest/Terminal.ts"
import * as HostPty from "../platform/HostPty.ts"
import { TailReadable } from "../platform/TailReadable.ts"

/** Options of `bootPty`. */
export interface PtyBootOptions {
  /** Path of the program: absolute, or relative to `cwd`. */
  readonly binary: string
  readonly args?: ReadonlyArray<string>
  /** Variables over this process's own. */
  readonly env?: Readonly<Record<string, string>>
  readonly cwd?: string
  /** Size of the terminal. Default 80 columns, 24 rows. */
  readonly cols?: number
  readonly rows?: number
  /** Value of TERM. Default `xterm-256color`. */
  readonly name?: string
}

/** A running program in a terminal. */
export interface PtyVmHandle {
  readonly pid: number
  /** Bytes that are typed into the terminal. */
  readonly stdin: Writable
  /** The terminal's output. Until the first read its last MiB is kept; from then on the program waits for the reader. */
  readonly stdout: Readable
  /** The same stream as `stdout`, because a terminal has one. */
  readonly stderr: Readable
  /** Resizes the terminal, which the program learns by SIGWINCH. Does nothing after the program's end. */
  readonly resize: (cols: number, rows: number) => void
  readonly wait: () => Promise<{ readonly code: number | null; readonly signal: NodeJS.Signals | null }>
  /** Kills the program. Resolves when it has ended. */
  readonly kill: () => Promise<void>
  /** The last MiB of output. */
  readonly output: () => Promise<string>
  readonly errorOutput: () => Promise<string>
}

const tailBytes = 1024 * 1024

/** Starts the program. It is hung up when this process ends. Throws BootError when the program cannot be run. */
export const bootPty = (options: PtyBootOptions): PtyVmHandle => {
  const { args = [], cols = 80, cwd = process.cwd(), name = "xterm-256color", rows = 24 } = options
  const binary = path.resolve(cwd, options.binary)
  const bad = checkSize({ columns: cols, rows }) ?? checkBinary(binary)
  if (bad !== undefined) throw bad
  const pty = HostPty.spawn(binary, args, {
    name,
    cols,
    rows,
    cwd,
    env: { ...process.env, TERM: name, ...options.env },
    encoding: null
  })

  const screen = new TailReadable(tailBytes)
  pty.onData((bytes) => {
    pty.pause()
    Effect.runCallback(screen.write(bytes), { onExit: () => pty.resume() })
  })
  const stdin = new Writable({
    write: (chunk: Buffer, _encoding, done) => {
      pty.write(chunk)
      done()
    }
  })
  let isOver = false
  const ended = new Promise<Awaited<ReturnType<PtyVmHandle["wait"]>>>((resolve) => {
    pty.onExit(({ exitCode, signal = 0 }) => {
      isOver = true
      stdin.destroy()
      Effect.runSync(screen.end)
      resolve(signal === 0 ? { code: exitCode, signal: null } : { code: null, signal: signalNames.get(signal) ?? null })
    })
  })
  const shown = async () => screen.tail.toString()
  return {
    pid: pty.pid,
    stdin,
    stdout: screen,
    stderr: screen,
    resize: (columns, rows) => {
      const bad = checkSize({ columns, rows })
      if (bad !== undefined) throw bad
      if (!isOver) pty.resize(columns, rows)
    },
    wait: () => ended,
    kill: async () => {
      if (!isOver) pty.kill("SIGKILL")
      Effect.runSync(screen.unlimit)
      await ended
    },
    output: shown,
    errorOutput: shown
  }
}

const signalNames = new Map(
  Object.entries(os.constants.signals).map(([name, number]) => [number, name as NodeJS.Signals] as const)
)

/** Checks the program before, because a terminal reports a missing program only as text. */
const checkBinary = (binary: string): BootError | undefined => {
  try {
    accessSync(binary, constants.X_OK)
    if (statSync(binary).isFile()) return undefined
  } catch {
    // the error below says it
  }
  return new BootError({
    code: "BOOT_VMM_MISSING",
    message: `${binary} is not there, or no program that may be run`,
    hint: "`binary` is absolute, or relative to `cwd`; it is not looked up in PATH"
  })
}
