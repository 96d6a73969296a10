import { createRequire } from "node:module"

/** A program of this host that runs in a pseudo-terminal. */
export interface HostPty {
  readonly pid: number
  readonly onData: (listener: (bytes: Buffer) => void) => void
  /** Called once the program has ended and `onData` has been given all its output. */
  readonly onExit: (listener: (exit: { readonly exitCode: number; readonly signal?: number }) => void) => void
  readonly write: (bytes: Uint8Array) => void
  readonly resize: (columns: number, rows: number) => void
  readonly kill: (signal: NodeJS.Signals) => void
  readonly pause: () => void
  readonly resume: () => void
}

interface NodePty {
  readonly spawn: (
    file: string,
    args: ReadonlyArray<string>,
    options: {
      readonly name: string
      readonly cols: number
      readonly rows: number
      readonly cwd: string
      readonly env: Readonly<Record<string, string | undefined>>
      /** `onData` gets bytes, not text. */
      readonly encoding: null
    }
  ) => HostPty
}

/** Starts a program in a terminal. Loads the native module on the first call, because nothing else needs it. */
export const spawn: NodePty["spawn"] = (file, args, options) => {
  const pty: NodePty = createRequire(import.meta.url)("@lydell/node-pty")
  return pty.spawn(file, args, options)
}
