/**
 * Packers for callers that start a machine by other means than `boot`: they make an initramfs of a root filesystem, a bundle or a directory. Every
 * packer writes a file beside `out` and renames it; after a failure an older `out` is unchanged. Entries are sorted by name and have no times, so
 * the same input gives the same bytes, except for the clock's seed.
 */
export { parseExcludes } from "./archive.ts"
export { cli } from "./commandLine.ts"
export * from "./packers.ts"
