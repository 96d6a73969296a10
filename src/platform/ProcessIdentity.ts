import { Schema } from "effect"

/**
 * A process that cannot be mistaken for another: pids are reused, so the start time (field 22 of /proc/<pid>/stat, clock ticks
 * since host boot, proc(5)) goes with it. It holds for one host boot; entries record the boot id beside it.
 */
export const ProcessIdentity = Schema.Struct({ pid: Schema.Int.pipe(Schema.positive()), startTime: Schema.Int })
export type ProcessIdentity = typeof ProcessIdentity.Type
