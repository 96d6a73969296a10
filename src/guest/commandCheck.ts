import * as path from "node:path"
import { ExecError } from "../errors.ts"

const maxString = 128 * 1024

/**
 * The error of a command that no guest could run, before anything is sent: EXEC_ARGUMENT_INVALID (NUL bytes, a variable without a name),
 * EXEC_CWD_INVALID (a relative directory), or EXEC_ARGUMENTS_TOO_LARGE (beyond execve(2)'s MAX_ARG_STRLEN or the space for all arguments).
 */
export const checkCommand = ({
  argv,
  cwd,
  env,
  user
}: {
  readonly argv: ReadonlyArray<string>
  readonly env?: Readonly<Record<string, string>>
  readonly cwd?: string
  readonly user?: string
}): ExecError | undefined => {
  const strings = [...argv, ...Object.entries(env ?? {}).map(([key, value]) => `${key}=${value}`)]
  if ([...strings, cwd ?? "", user ?? ""].some((s) => s.includes("\0"))) {
    return new ExecError({
      code: "EXEC_ARGUMENT_INVALID",
      message: "an argument, environment variable or directory holds a NUL byte",
      hint: "no Linux process can be given one; pass such bytes on stdin or in a file"
    })
  }
  if (cwd !== undefined && !path.posix.isAbsolute(cwd)) {
    return new ExecError({
      code: "EXEC_CWD_INVALID",
      message: `the working directory ${JSON.stringify(cwd)} is not an absolute path in the guest`,
      hint: "begin it with `/`"
    })
  }
  if (Object.keys(env ?? {}).some((key) => key === "" || key.includes("="))) {
    return new ExecError({
      code: "EXEC_ARGUMENT_INVALID",
      message: "an environment variable's name is empty or holds `=`"
    })
  }
  const sizes = strings.map((s) => Buffer.byteLength(s) + 1)
  const total = sizes.reduce((sum, size) => sum + size, 0)
  if (sizes.some((size) => size > maxString) || total > 2 * 1024 * 1024) {
    return new ExecError({
      code: "EXEC_ARGUMENTS_TOO_LARGE",
      message: `arguments and environment are too large (${total} bytes): Linux takes 128 KiB in one string and 2 MiB in all`,
      hint: "pass large data on stdin or in a file"
    })
  }
  return undefined
}
