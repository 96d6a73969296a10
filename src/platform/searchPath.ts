/** Directories of mke2fs, debugfs and other system programs. Debian leaves them out of the PATH of users other than root. */
const systemDirectories = ["/usr/sbin", "/sbin"]

/** The PATH by which host programs are looked up and started: the caller's, then the directories of system programs. */
export const searchPath = (path: string | undefined = process.env["PATH"]): string => {
  const own = (path ?? "/usr/local/bin:/usr/bin:/bin").split(":").filter((dir) => dir !== "")
  return [...own, ...systemDirectories.filter((dir) => !own.includes(dir))].join(":")
}
