export { parseExcludes } from "./archive.ts"
export { cli } from "./commandLine.ts"
export * from "./packers.ts"
