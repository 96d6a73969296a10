/**
 * Archives for callers that start a machine by other means than `boot`: whole root filesystems, bundles and directories as an initramfs. Every
 * packer writes beside `out` and renames it; a failure leaves what was there. Entries are in the order of their names and have no times, so
 * the same input gives the same bytes but for the seed of the guest's clock.
 */
export { parseExcludes } from "./archive.ts"
export { cli } from "./commandLine.ts"
export * from "./packers.ts"
