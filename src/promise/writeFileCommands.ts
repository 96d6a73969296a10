import { randomUUID } from "node:crypto"

/** Shell lines that write a file, for callers that can only run commands. `Vm.writeFile` does not need them. */

export interface WriteFileCommandOptions {
  /** Permission bits. Default: unchanged. */
  readonly mode?: number
  /** Makes missing parent directories. Default true. */
  readonly recursive?: boolean
  readonly append?: boolean
}

/** Base64 characters in one command: a multiple of 4, and well below the longest argument (MAX_ARG_STRLEN, 128 KiB). */
const chunk = 65_536

const quoted = (text: string) => `'${text.replaceAll("'", "'\\''")}'`

const wrap = (guestPath: string, decode: string, options: WriteFileCommandOptions): string => {
  const target = quoted(guestPath)
  const { mode, recursive = true } = options
  return [
    ...(recursive ? [`mkdir -p -- "$(dirname -- ${target})"`] : []),
    `${decode} ${options.append === true ? ">>" : ">"}${target}`,
    ...(mode === undefined ? [] : [`chmod -- ${mode.toString(8)} ${target}`])
  ].join(" && ")
}

/** One line that writes the file. `contents` must fit into one argument; a string is written as UTF-8. */
export const buildWriteFileCmd = (
  guestPath: string,
  contents: Buffer | string,
  options: WriteFileCommandOptions = {}
): string => wrap(guestPath, `printf %s ${quoted(Buffer.from(contents).toString("base64"))} | base64 -d`, options)

/** Lines that write the file, to be run in order while each succeeds. Large contents are gathered in the guest's /tmp; the last line decodes them. */
export const buildWriteFileCmds = (
  guestPath: string,
  contents: Buffer | string,
  options: WriteFileCommandOptions = {}
): ReadonlyArray<string> => {
  const text = Buffer.from(contents).toString("base64")
  if (text.length <= chunk) return [buildWriteFileCmd(guestPath, contents, options)]
  const staging = `/tmp/.machinen-write-${randomUUID()}`
  const parts = Array.from({ length: Math.ceil(text.length / chunk) }, (_, i) => text.slice(i * chunk, (i + 1) * chunk))
  return [
    ...parts.map((part) => `printf %s ${quoted(part)} >>${staging}`),
    // the gathered file is removed even when the target cannot be written
    `{ ${wrap(guestPath, `base64 -d <${staging}`, options)}; }; code=$?; rm -f ${staging}; (exit $code)`
  ]
}
