/** Where mke2fs, debugfs and other system programs are; Debian leaves these out of the PATH of a user who is not root. */
const systemDirectories = ["/usr/sbin", "/sbin"]

/** The PATH that host programs are looked up in and started with: the caller's, then the directories of system programs. */
export const searchPath = (path: string | undefined = process.env["PATH"]): string => {
  const own = (path ?? "/usr/local/bin:/usr/bin:/bin").split(":").filter((dir) => dir !== "")
  return [...own, ...systemDirectories.filter((dir) => !own.includes(dir))].join(":")
}
