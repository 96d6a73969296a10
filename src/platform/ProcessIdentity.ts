import { Schema } from "effect"

/**
 * Identifies a process. Pids are reused, so the start time goes with the pid (field 22 of /proc/<pid>/stat, in clock ticks since host boot,
 * proc(5)). Valid within one host boot only: records keep the boot id beside it.
 */
export const ProcessIdentity = Schema.Struct({ pid: Schema.Int.pipe(Schema.positive()), startTime: Schema.Int })
export type ProcessIdentity = typeof ProcessIdentity.Type
