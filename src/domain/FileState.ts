import { Schema } from "effect"

/**
 * A file as it is now. Whoever changes it changes one of these: the time of its last change (ctime) is the kernel's own and cannot be set
 * back, unlike the time of its last modification (mtime).
 */
export const FileState = Schema.Struct({
  path: Schema.String,
  sizeBytes: Schema.Number,
  /** Nanoseconds since 1970, which are more than a number can hold exactly. */
  changedNs: Schema.String,
  inode: Schema.Number,
  device: Schema.Number
})
export type FileState = typeof FileState.Type
